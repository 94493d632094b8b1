"""How far the stream moves between all pairs of its points."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.checks import Mask, Tokens, checked_choice
from arrakis_jax.core.numerics import norm, ratio, root
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import over_points
from arrakis_jax.movement.residual_movement import Movement, _movement
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.stream.points import Points, kept_tokens, point_capture, stream_points
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

BLOCK = 8  # dimensions summed at once
AT_ONCE = 128  # tokens
REDUCE = (None, "mean", "median", "ratio_of_means")


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
            "mean"; "median"; or "ratio_of_means", the relative norm as the mean of `|b - a|` over
            the mean of `|a|`, where "mean" is the mean of the tokens' ratios (cosine and angle: the
            mean).
        first: False leaves out each row's first real token. The stream there may be a hundred times
            longer than elsewhere, and then rules a mean.
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
        >>> found = movement_matrix(model, tokens)
        >>> found.points[1], found.angle.shape
        (('resid_mid', 0), (9, 9, 1, 4))
        >>> movement_matrix(model, tokens, reduce="median", first=False).angle.shape
        (9, 9)

    Reference:
        Gromov et al. 2024 for the angle; Sun et al. 2024 for the first position.
    """
    checked_choice("reduce", reduce, REDUCE)
    least = 1 if reduce else 0
    return over_points(
        _run_matrix, _matrix, model, tokens, mask, check, first=first, least=least, reduce=reduce
    )


@compiled("reduce", "first")
def _run_matrix(model, tokens, mask, *, reduce, first):
    capture = point_capture(model.config)
    return _all_pairs(model, model(tokens, mask=mask, capture=capture).residuals, reduce, first)


@compiled("reduce", "first")
def _matrix(model, stream, *, reduce, first):
    return _all_pairs(model, stream, reduce, first)


def _all_pairs(
    model: Transformer, stream: ResidualStream, reduce: str | None, first: bool
) -> MovementMatrix:
    points, names = stream_points(model.config, stream)
    kept = kept_tokens(stream, first)
    found, moved = _over_positions(points)
    if reduce is None:
        found = jax.tree.map(lambda x: jnp.where(over(kept, x), x, 0), found)
        return MovementMatrix(**vars(found), points=names)
    n_kept = kept.sum()

    def mean(value: Float[Array, "... B T"]) -> Float[Array, "..."]:
        return jnp.where(over(kept, value), value, 0).sum((-2, -1)) / n_kept

    def median(value: Float[Array, "... B T"]) -> Float[Array, "..."]:
        last = jnp.where(over(kept, value), value, jnp.inf).reshape(*value.shape[:-2], -1)
        ordered = jnp.sort(last, -1)
        middle = (ordered[..., (n_kept - 1) // 2] + ordered[..., n_kept // 2]) / 2
        return jnp.where(jnp.isnan(mean(value)), jnp.nan, middle)

    reduced = jax.tree.map(median if reduce == "median" else mean, found)
    if reduce == "ratio_of_means":
        length = mean(norm(points.astype(moved.dtype)))
        reduced = replace(reduced, relative_norm=ratio(mean(moved), length[:, None]))
    return MovementMatrix(**vars(reduced), points=names)


def _over_positions(points: Float[Array, "P B T D"]) -> tuple[Movement, Float[Array, "P P B T"]]:
    """The movement between all pairs, and `|b - a|`, of few positions at a time.

    On CPUs of as few as a cache holds. A sharded batch stays where it is.
    """
    _, b, t, _ = points.shape
    size = min(t, max(1, AT_ONCE // b)) if jax.default_backend() == "cpu" else t
    starts = np.minimum(np.arange(0, t, size), t - size)

    def of_positions(start: Int[Array, ""]) -> tuple[Movement, Array]:
        x = jax.lax.dynamic_slice_in_dim(points, start, size, 2)
        found = _pairs(x.reshape(len(x), -1, x.shape[-1]))
        return jax.tree.map(lambda y: y.reshape(*y.shape[:2], b, size), found)

    found = jax.lax.map(of_positions, jnp.asarray(starts))
    part = np.arange(t) // size
    place = np.arange(t) - starts[part]  # the last part may begin in the one before
    return jax.tree.map(lambda x: jnp.moveaxis(x[part, ..., place], 0, -1), found)


def _pairs(x_PND: Float[Array, "P N D"]) -> tuple[Movement, Float[Array, "P P N"]]:
    """The movement between all pairs, and `|b - a|`.

    Squares are summed over a few dimensions at a time by elementwise sums with positions last: a
    sum over the last axis is not vectorised on CPUs.
    """
    x_PND = x_PND.astype(jnp.promote_types(x_PND.dtype, jnp.float32))
    length_PN = norm(x_PND)
    scale_PN = ratio(1, length_PN)
    p, n, d = x_PND.shape
    x_DPN = jnp.pad(jnp.transpose(x_PND, (2, 0, 1)), ((0, -d % BLOCK), (0, 0), (0, 0)))

    def squares(a: Array, b: Array) -> Array:
        terms = [jnp.square(y[None] - x[:, None]) for x, y in zip(a, b, strict=True)]
        while len(terms) > 1:
            terms = [x + y for x, y in zip(terms[::2], terms[1::2], strict=True)]
        return terms[0]

    def add(sums: tuple[Array, ...], x: Float[Array, "K P N"]) -> tuple[tuple, None]:
        # Of the block, not of each pair again.
        x, u = jax.lax.optimization_barrier((x, x * scale_PN[None]))
        found = squares(x, x), squares(u, u), squares(u, -u)
        return tuple(a + b for a, b in zip(sums, found, strict=True)), None

    zero = jnp.zeros((p, p, n), x_PND.dtype)
    sums, _ = jax.lax.scan(add, (zero,) * 3, x_DPN.reshape(-1, BLOCK, p, n))
    moved, apart, together = (root(x) for x in sums)
    return _movement(length_PN[:, None], length_PN[None], moved, apart, together), moved
