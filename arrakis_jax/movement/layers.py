"""How far the stream moves between two points, at every position."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from arrakis_jax.axes import Array, Float, Int
from arrakis_jax.checks import Mask, Tokens, checked_choice, checked_layer, checked_tokens
from arrakis_jax.forward import compiled, stream_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import norm, ratio
from arrakis_jax.points import Points, kept_places, over_points, point_capture, stream_points
from arrakis_jax.residuals import Capture, ModelOutput, Record, ResidualStream

_POSTS = Capture(("resid_pre", "final"))
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
    apart, together = norm(u - w), norm(u + w)
    both = (norm(a) != 0) & (norm(b) != 0)
    angle = 2 * jnp.arctan2(apart, jnp.where(both, together, 1))
    return Movement(
        relative_norm=ratio(norm(b - a), norm(a)),
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
        reduce: None, or how the real tokens of the whole batch become one number for each pair,
            while pairs are gone through: "mean"; "median"; or "ratio_of_means", the relative norm
            as the mean of `|b - a|` over the mean of `|a|`, where "mean" is the mean of the tokens'
            ratios (cosine and angle: the mean).
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
    if reduce is None:
        moved = jax.tree.map(lambda x: jnp.where(kept[None, None], x, 0), _by_positions(points))
        return MovementMatrix(**vars(moved), points=names)
    n_kept = kept.sum()

    def mean(value: Float[Array, "P B T"]) -> Float[Array, " P"]:
        return jnp.where(kept[None], value, 0).reshape(len(value), -1).sum(-1) / n_kept

    def median(value: Float[Array, "P B T"]) -> Float[Array, " P"]:
        last = jnp.where(kept[None], value, jnp.inf).reshape(len(value), -1)
        ordered = jnp.sort(last, -1)
        middle = (ordered[:, (n_kept - 1) // 2] + ordered[:, n_kept // 2]) / 2
        return jnp.where(jnp.isnan(mean(value)), jnp.nan, middle)

    # One row of pairs at a time: only one array of the points' own size exists beside them.
    def from_point(a: Float[Array, "B T D"]) -> Movement:
        a = jnp.broadcast_to(a, points.shape)
        moved = movement(a, points)
        reduced = jax.tree.map(median if reduce == "median" else mean, moved)
        if reduce != "ratio_of_means":
            return reduced
        acc = jnp.promote_types(a.dtype, jnp.float32)
        a, b = a.astype(acc), points.astype(acc)
        return replace(reduced, relative_norm=ratio(mean(norm(b - a)), mean(norm(a))))

    pairs = jax.lax.map(from_point, points)
    return MovementMatrix(
        relative_norm=pairs.relative_norm, cosine=pairs.cosine, angle=pairs.angle, points=names
    )


def _by_positions(points: Float[Array, "P B T D"]) -> Movement:
    """The movement between all pairs, `[P,P,B,T]`, of few positions at a time.

    A cache holds them, and a sharded batch stays where it is.
    """
    n_points, b, t, _ = points.shape
    size = max(n for n in range(1, t + 1) if t % n == 0 and (n == 1 or n * b <= 8))

    def of_positions(start: Array) -> Movement:
        x = jax.lax.dynamic_slice_in_dim(points, start, size, 2)
        return movement(x[:, None], x[None])

    found = jax.lax.map(of_positions, jnp.arange(0, t, size))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(n_points, n_points, b, t), found)
