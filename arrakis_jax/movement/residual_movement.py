"""How far the stream moves between the ends of two layers, at every position."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import Mask, Tokens, checked_layer
from arrakis_jax.core.numerics import norm, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

_FIELDS = ("resid_pre", "final")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Movement(Record):
    """How the stream changes from a point a to a point b.

    Attributes:
        relative_norm: `|b - a| / |a|`.
        cosine: the cosine of the angle between them.
        angle: the angle, in radians in [0, pi].
    """

    relative_norm: Float[Array, "B T"]
    cosine: Float[Array, "B T"]
    angle: Float[Array, "B T"]


def movement(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Movement:
    """The movement from vectors a to vectors b; zero where either is zero.

    Differences are taken before norms, and the angle is `2 atan2(|u - w|, |u + w|)` of the unit
    vectors u and w. That is accurate for the smallest angles, where arccos is not.
    """
    acc = jnp.promote_types(a.dtype, jnp.float32)
    a, b = a.astype(acc), b.astype(acc)
    u, w = (ratio(x, norm(x)[..., None]) for x in (a, b))
    return movement_of_lengths(norm(a), norm(b), norm(b - a), norm(u - w), norm(u + w))


def movement_of_lengths(
    a: Array, b: Array, moved: Array, apart: Array, together: Array
) -> Movement:
    """The movement from the lengths of a, b, b - a, and their unit vectors' u - w and u + w."""
    # |u + w|^2 - |u - w|^2 = 4 u . w
    both = (a != 0) & (b != 0)
    angle = 2 * jnp.arctan2(apart, jnp.where(both, together, 1))
    return Movement(
        relative_norm=ratio(moved, a),
        cosine=jnp.where(both, (together**2 - apart**2) / 4, 0),
        angle=jnp.where(both, angle, 0),
    )


def residual_movement(
    model: Transformer,
    input_ids: Tokens | ResidualStream | ModelOutput,
    layer_idx1: int | Int[Array, ""],
    layer_idx2: int | Int[Array, ""],
    *,
    mask: Mask | None = None,
    check: bool = False,
) -> Movement:
    """How far the stream moves from the end of one layer to the end of another.

    Args:
        model: the transformer.
        input_ids: `[B,T]` token ids, or a captured stream (resid_pre and final), then not run
            again.
        layer_idx1: the layer whose resid_post is a; an int in [-L, L) or a traced scalar.
        layer_idx2: the layer whose resid_post is b.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        Movement of `[B,T]` arrays: `|b - a| / |a|`, cosine, and angle in radians; zero at padding.

    Raises:
        IndexError: if there is no such layer.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> residual_movement(model, tokens, 0, -1, mask=mask)
        Movement(relative_norm=float32[2, 4], cosine=float32[2, 4], angle=float32[2, 4])

    Reference:
        `residual_movement` of Arrakis; Gromov et al. 2024 for the angle.
    """
    n_layers = model.config.n_layers
    first = checked_layer(layer_idx1, n_layers, name="layer_idx1")
    second = checked_layer(layer_idx2, n_layers, name="layer_idx2")
    source = source_of(model, input_ids, mask, check=check, name="input_ids")
    return _between(model, source, first, second)


@compiled()
def _between(
    model: Transformer, source: Source, first: Int[Array, ""], second: Int[Array, ""]
) -> Movement:
    stream = source.stream(model, _FIELDS)
    stream.need(*_FIELDS, all_layers=True)
    last = model.config.n_layers - 1

    def resid_post(layer: Array) -> Float[Array, "B T D"]:
        # A layer's end is the next one's start: no array of all ends is made for two of them.
        following = jnp.minimum(layer + 1, last)
        pre = jax.lax.dynamic_index_in_dim(stream.resid_pre, following, keepdims=False)
        return jnp.where(layer == last, stream.final, pre)

    return movement(resid_post(first), resid_post(second))
