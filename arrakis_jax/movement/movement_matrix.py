"""How far the stream moves between all pairs of its points."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.checks import Mask, Tokens, checked_choice
from arrakis_jax.core.numerics import norm, ratio, root
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, point_source
from arrakis_jax.movement.residual_movement import Movement, movement_of_lengths
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.stream.points import Points, kept_tokens, point_fields, stream_points
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

_BLOCK = 8  # how many dimensions are summed at once; a power of two
AT_ONCE = 128  # how many tokens of all points a CPU's cache holds
_REDUCE = (None, "mean", "median", "ratio_of_means")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class MovementMatrix(Movement):
    """The movement between all pairs of P stream points: `[P,P,B,T]`, from the first to the second.

    Reduced over the tokens of the batch: `[P,P]`.

    Attributes:
        points: the points' names, as `(field, layer)`; the last is `("final", None)`.
    """

    points: Points = field(metadata={"static": True})


def movement_matrix(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    *,
    reduce: str | None = None,
    first: bool = True,
    mask: Mask | None = None,
    check: bool = False,
) -> MovementMatrix:
    """The movement between all pairs of stream points.

    The P points are resid_pre and resid_mid of every layer (resid_pre only in attention-only
    models, where resid_mid is the next resid_pre, and with parallel blocks, which have none) and
    final.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream (resid_pre, resid_mid and final).
        reduce: None, or how the real tokens of the whole batch become one number for each pair:
            "mean"; "median"; or "ratio_of_means". That takes the mean of `|b - a|` over the mean of
            `|a|` as the relative norm, where "mean" takes the mean of the tokens' ratios, and the
            mean of cosines and angles.
        first: False leaves out each row's first real token. The stream there may be a hundred times
            longer than elsewhere, and would rule a mean.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        `[P,P,B,T]` arrays, from the first axis' point to the second's, and the points' names;
        zero at padding, and at tokens left out. `[P,P]` if reduced.

    Raises:
        ValueError: for another reducer, or if no token is left to reduce.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, _ = encode(tokenizer, "Alice and Tom")
        >>> moves = movement_matrix(model, tokens)
        >>> moves.points[1], moves.angle.shape
        (('resid_mid', 0), (9, 9, 1, 4))
        >>> movement_matrix(model, tokens, reduce="median", first=False).angle.shape
        (9, 9)

    Reference:
        Gromov et al. 2024 for the angle; Sun et al. 2024 for the first position.
    """
    checked_choice("reduce", reduce, _REDUCE)
    source = point_source(model, tokens, mask, check, first=first, least=1 if reduce else 0)
    return _matrix(model, source, reduce=reduce, first=bool(first))


@compiled("reduce", "first")
def _matrix(
    model: Transformer, source: Source, *, reduce: str | None, first: bool
) -> MovementMatrix:
    stream = source.stream(model, point_fields(model.config))
    points, names = stream_points(model.config, stream)
    kept = kept_tokens(stream, first)
    moves, moved = _over_positions(points)
    if reduce is None:
        moves = jax.tree.map(lambda x: jnp.where(over(kept, x), x, 0), moves)
        return MovementMatrix(**vars(moves), points=names)
    n_kept = kept.sum()

    def mean(value: Float[Array, "... B T"]) -> Float[Array, ...]:
        return jnp.where(over(kept, value), value, 0).sum((-2, -1)) / n_kept

    def median(value: Float[Array, "... B T"]) -> Float[Array, ...]:
        # Tokens left out are sorted behind the others, whose number may be traced.
        last = jnp.where(over(kept, value), value, jnp.inf).reshape(*value.shape[:-2], -1)
        ordered = jnp.sort(last, -1)
        middle = (ordered[..., (n_kept - 1) // 2] + ordered[..., n_kept // 2]) / 2
        return jnp.where(jnp.isnan(mean(value)), jnp.nan, middle)

    reduced = jax.tree.map(median if reduce == "median" else mean, moves)
    if reduce == "ratio_of_means":
        length = mean(norm(points.astype(moved.dtype)))
        reduced = replace(reduced, relative_norm=ratio(mean(moved), length[:, None]))
    return MovementMatrix(**vars(reduced), points=names)


def _over_positions(points: Float[Array, "P B T D"]) -> tuple[Movement, Float[Array, "P P B T"]]:
    """The movement between all pairs, and `|b - a|`, a part of the positions at a time.

    On a CPU a part is what its cache holds. Parts cut T and not B: a sharded batch stays in place.
    """
    _, b, t, _ = points.shape
    size = min(t, max(1, AT_ONCE // b)) if jax.default_backend() == "cpu" else t
    starts = np.minimum(np.arange(0, t, size), t - size)

    def of_part(start: Int[Array, ""]) -> tuple[Movement, Array]:
        x = jax.lax.dynamic_slice_in_dim(points, start, size, 2)
        pairs = _pairs(x.reshape(len(x), -1, x.shape[-1]))
        return jax.tree.map(lambda y: y.reshape(*y.shape[:2], b, size), pairs)

    parts = jax.lax.map(of_part, jnp.asarray(starts))
    part = np.arange(t) // size
    column = np.arange(t) - starts[part]  # the last part may begin in the one before
    return jax.tree.map(lambda x: jnp.moveaxis(x[part, ..., column], 0, -1), parts)


def _pairs(x_PND: Float[Array, "P N D"]) -> tuple[Movement, Float[Array, "P P N"]]:
    """The movement between all pairs, and `|b - a|`.

    It needs the lengths of b - a and of both u - w and u + w for unit vectors u and w, whose
    differences must be taken before squares (see `movement`): no Gram matrix gives them exactly.
    """
    # Dimensions go first and positions last. Then squares are summed elementwise, _BLOCK dimensions
    # at a time: XLA vectorises that on a CPU, and does not vectorise a sum over the last axis.
    x_PND = x_PND.astype(jnp.promote_types(x_PND.dtype, jnp.float32))
    length_PN = norm(x_PND)
    scale_PN = ratio(1, length_PN)
    p, n, d = x_PND.shape
    x_DPN = jnp.pad(jnp.transpose(x_PND, (2, 0, 1)), ((0, -d % _BLOCK), (0, 0), (0, 0)))

    def squares(a: Array, b: Array) -> Array:
        terms = [jnp.square(y[None] - x[:, None]) for x, y in zip(a, b, strict=True)]
        while len(terms) > 1:  # in pairs, which rounds less than one after another
            terms = [x + y for x, y in zip(terms[::2], terms[1::2], strict=True)]
        return terms[0]

    def add(sums: tuple[Array, ...], x: Float[Array, "K P N"]) -> tuple[tuple, None]:
        # The barrier keeps XLA from computing u again for every pair that reads it.
        x, u = jax.lax.optimization_barrier((x, x * scale_PN[None]))
        of_block = squares(x, x), squares(u, u), squares(u, -u)
        return tuple(a + b for a, b in zip(sums, of_block, strict=True)), None

    zero = jnp.zeros((p, p, n), x_PND.dtype)
    sums, _ = jax.lax.scan(add, (zero,) * 3, x_DPN.reshape(-1, _BLOCK, p, n))
    moved, apart, together = (root(x) for x in sums)
    moves = movement_of_lengths(length_PN[:, None], length_PN[None], moved, apart, together)
    return moves, moved
