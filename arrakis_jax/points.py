"""The points of the residual stream, in order: what lenses and movement go over."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from arrakis_jax.axes import Array, Bool, Float
from arrakis_jax.checks import Mask, Tokens, checked_tokens, host
from arrakis_jax.config import ModelConfig
from arrakis_jax.errors import expected
from arrakis_jax.forward import stream_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.places import Places
from arrakis_jax.residuals import Capture, ModelOutput, ResidualStream

Points = tuple[tuple[str, int | None], ...]


def point_fields(config: ModelConfig) -> tuple[str, ...]:
    """The fields of the stream that its points are read from."""
    halves = not config.parallel and (config.d_mlp > 0 or config.n_experts > 0)
    return ("resid_pre", "resid_mid", "final") if halves else ("resid_pre", "final")


def point_capture(config: ModelConfig) -> Capture:
    """What a forward must return for its stream points."""
    return Capture(point_fields(config))


def stream_points(
    model: Transformer, stream: ResidualStream
) -> tuple[Float[Array, "P B T D"], Points]:
    """The P points of a captured stream, first to last, and their names as `(field, layer)`.

    They are resid_pre and resid_mid of every layer (resid_pre only in attention-only models, where
    resid_mid is the next resid_pre, and with parallel blocks, which have none) and final.
    """
    names = point_fields(model.config)[:-1]
    stream.need(*names, "final", all_layers=True)
    stacks = jnp.stack([getattr(stream, name) for name in names], axis=1)
    points = jnp.concatenate([stacks.reshape(-1, *stacks.shape[2:]), stream.final[None]])
    labels = [(name, layer) for layer in range(model.config.n_layers) for name in names]
    return points, (*labels, ("final", None))


def kept_places(stream: ResidualStream, first: bool) -> Bool[Array, "B T"]:
    """Which of the positions that a stream holds are real, without each row's first if asked."""
    stream.need("mask")
    places = Places.of(stream.mask.shape, stream.mask)
    real, position = places.real, places.position
    if stream.positions is not None:
        wanted = jnp.array(stream.positions, int)
        real, position = places.find(wanted)[1], places.number(wanted)
    return real if first else real & (position > 0)


def over_points(
    run: Callable,
    read: Callable,
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    mask: Mask | None,
    check: bool,
    *,
    first: bool,
    least: int = 0,
    **options: Any,
) -> Any:
    """`run(model, tokens, mask)` on token ids, or `read(model, stream)` on a captured stream.

    Checked before, with ValueError if fewer tokens are kept than the `least` that a method needs.
    """
    stream = stream_of(tokens, mask)
    if stream is not None:
        stream.need("mask", *point_fields(model.config), all_layers=True)
        held = kept_places(stream, True) if stream.positions is not None else stream.mask
        _check_enough(held.shape, held, first, least)
        return read(model, stream, first=bool(first), **options)
    tokens, mask = checked_tokens(model.config, tokens, mask, check=check)
    _check_enough(tokens.shape, mask, first, least)
    return run(model, tokens, mask, first=bool(first), **options)


def _check_enough(shape: tuple[int, ...], mask: Array | None, first: bool, least: int) -> None:
    real = np.ones(shape, bool) if mask is None else host(mask)
    if real is None:
        return
    kept = int((real.sum(-1) - (not first)).clip(0).sum())
    if kept < least:
        must = f"{least} real tokens or more" + ("" if first else " after each row's first")
        raise ValueError(expected("tokens", must, kept, "give more or longer prompts"))


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
