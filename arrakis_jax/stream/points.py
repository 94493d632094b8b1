"""The points of the residual stream, in order: lenses and measures of movement read them all."""

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.stream.capture import Capture
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ResidualStream

Points = tuple[tuple[str, int | None], ...]


def point_fields(config: ModelConfig) -> tuple[str, ...]:
    """The fields of the stream that hold its points."""
    has_mid = config.any_mlp and not config.parallel
    return ("resid_pre", "resid_mid", "final") if has_mid else ("resid_pre", "final")


def point_capture(config: ModelConfig) -> Capture:
    """What a forward must return so that `stream_points` can be read."""
    return Capture(point_fields(config))


def stream_points(
    config: ModelConfig, stream: ResidualStream
) -> tuple[Float[Array, "P B T D"], Points]:
    """The P points of a captured stream, first to last, and their names as `(field, layer)`.

    The points are resid_pre and resid_mid of every layer, and final. Attention-only models and
    parallel blocks have no resid_mid of their own: in the former it is the next resid_pre.
    """
    names = point_fields(config)[:-1]
    stream.need(*names, "final", all_layers=True)
    # Stacked behind L, the fields of one layer follow each other when L and they become P.
    stacks = jnp.stack([getattr(stream, name) for name in names], axis=1)
    points = jnp.concatenate([stacks.reshape(-1, *stacks.shape[2:]), stream.final[None]])
    labels = [(name, layer) for layer in range(config.n_layers) for name in names]
    return points, (*labels, ("final", None))


def kept_tokens(stream: ResidualStream, first: bool) -> Bool[Array, "B T"]:
    """Which positions of a captured stream are real; each row's first one only if `first`."""
    stream.need("mask")
    padding = Padding.of(stream.mask.shape, stream.mask)
    real, position = padding.real, padding.rank
    if stream.positions is not None:
        wanted = jnp.array(stream.positions, int)
        real, position = padding.columns(wanted)[1], padding.counted(wanted)
    return real if first else real & (position > 0)


def centred(x: Float[Array, "B T D"], kept: Bool[Array, "B T"]) -> Float[Array, "N D"]:
    """The kept vectors minus their mean, as one list; the vectors that are not kept become zero.

    In at least float32. Where the kept vectors differ by rounding alone, all become zero.
    """
    acc = jnp.promote_types(x.dtype, jnp.float32)
    x, real = x.astype(acc).reshape(-1, x.shape[-1]), kept.reshape(-1, 1)
    y = x = jnp.where(real, x, 0)
    # Twice, because the mean of many vectors is rounded. What remains is small, and its mean exact.
    for _ in range(2):
        y = jnp.where(real, y - y.sum(0, keepdims=True) / real.sum(), 0)
    floor = (8 * jnp.finfo(acc).eps) ** 2 * jnp.square(x).sum()
    return jnp.where(jnp.square(y).sum() <= floor, 0, y)
