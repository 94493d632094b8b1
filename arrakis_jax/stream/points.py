"""The points of the residual stream, in order: what lenses and movement go over."""

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.stream.capture import Capture
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ResidualStream

Points = tuple[tuple[str, int | None], ...]


def point_fields(config: ModelConfig) -> tuple[str, ...]:
    """The fields of the stream that its points are read from."""
    has_mid = config.any_mlp and not config.parallel
    return ("resid_pre", "resid_mid", "final") if has_mid else ("resid_pre", "final")


def point_capture(config: ModelConfig) -> Capture:
    """What a forward must return for its stream points."""
    return Capture(point_fields(config))


def stream_points(
    config: ModelConfig, stream: ResidualStream
) -> tuple[Float[Array, "P B T D"], Points]:
    """The P points of a captured stream, first to last, and their names as `(field, layer)`.

    They are resid_pre and resid_mid of every layer (resid_pre only in attention-only models, where
    resid_mid is the next resid_pre, and with parallel blocks, which have none) and final.
    """
    names = point_fields(config)[:-1]
    stream.need(*names, "final", all_layers=True)
    stacks = jnp.stack([getattr(stream, name) for name in names], axis=1)
    points = jnp.concatenate([stacks.reshape(-1, *stacks.shape[2:]), stream.final[None]])
    labels = [(name, layer) for layer in range(config.n_layers) for name in names]
    return points, (*labels, ("final", None))


def kept_tokens(stream: ResidualStream, first: bool) -> Bool[Array, "B T"]:
    """Which of the positions that a stream holds are real, without each row's first if asked."""
    stream.need("mask")
    padding = Padding.of(stream.mask.shape, stream.mask)
    real, position = padding.real, padding.rank
    if stream.positions is not None:
        wanted = jnp.array(stream.positions, int)
        real, position = padding.columns(wanted)[1], padding.counted(wanted)
    return real if first else real & (position > 0)


def centred(x: Float[Array, "B T D"], kept: Bool[Array, "B T"]) -> Float[Array, "N D"]:
    """Vectors as one list, in at least float32, minus the mean of those kept; the others zero.

    Vectors that differ by rounding alone become zero too.
    """
    acc = jnp.promote_types(x.dtype, jnp.float32)
    x, real = x.astype(acc).reshape(-1, x.shape[-1]), kept.reshape(-1, 1)
    y = x = jnp.where(real, x, 0)
    for _ in range(2):  # the mean of many vectors is rounded, that of what remains hardly
        y = jnp.where(real, y - y.sum(0, keepdims=True) / real.sum(), 0)
    floor = (8 * jnp.finfo(acc).eps) ** 2 * jnp.square(x).sum()
    return jnp.where(jnp.square(y).sum() <= floor, 0, y)
