"""How far the stream moves between two points, at every position."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.axes import Array, Float, Int, over
from arrakis_jax.checks import Mask, Tokens, checked_choice, checked_layer, checked_tokens
from arrakis_jax.forward import compiled, stream_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import norm, ratio, root
from arrakis_jax.points import Points, kept_places, over_points, point_capture, stream_points
from arrakis_jax.residuals import Capture, ModelOutput, Record, ResidualStream

_POSTS = Capture(("resid_pre", "final"))
BLOCK = 8  # dimensions summed at once
AT_ONCE = 128  # tokens
REDUCE = (None, "mean", "median", "ratio_of_means")


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class MovementMatrix(Movement):
    """The movement between all pairs of P stream points: `[P,P,B,T]`, from the first to the second.

    Reduced over the tokens of the batch: `[P,P]`.

    Attributes:
        points: the points' names, as `(field, layer)`; the last is `("final", None)`.
    """

    points: Points = field(metadata={"static": True})


def movement(a: Float[Array, "... D"], b: Float[Array, "... D"]) -> Movement:
    """The movement from vectors a to vectors b; zero where either is zero.

    Differences are taken before norms, and the angle is `2 atan2(|u - w|, |u + w|)` of the unit
    vectors u and w, which is accurate for the smallest of angles where arccos is not.
    """
    acc = jnp.promote_types(a.dtype, jnp.float32)
    a, b = a.astype(acc), b.astype(acc)
    u, w = (ratio(x, norm(x)[..., None]) for x in (a, b))
    return _movement(norm(a), norm(b), norm(b - a), norm(u - w), norm(u + w))


def _movement(a: Array, b: Array, moved: Array, apart: Array, together: Array) -> Movement:
    """The movement from the lengths of a, b, b - a, and their unit vectors' u - w and u + w."""
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
    stream = stream_of(input_ids, mask)
    if stream is not None:
        stream.need("resid_pre", "final", all_layers=True)
        return _between(stream.resid_pre, stream.final, first, second)
    tokens, mask = checked_tokens(model.config, input_ids, mask, check=check, name="input_ids")
    return _run_between(model, tokens, mask, first, second)


@jax.jit
def _between(resid_pre, final, first, second):
    last = resid_pre.shape[0] - 1

    def resid_post(layer: Array) -> Array:
        following = jax.lax.dynamic_index_in_dim(
            resid_pre, jnp.minimum(layer + 1, last), keepdims=False
        )
        return jnp.where(layer == last, final, following)

    return movement(resid_post(first), resid_post(second))


@compiled()
def _run_between(model, tokens, mask, first, second):
    stream = model(tokens, mask=mask, capture=_POSTS).residuals
    return _between(stream.resid_pre, stream.final, first, second)


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
    points, names = stream_points(model, stream)
    kept = kept_places(stream, first)
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
