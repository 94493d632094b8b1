"""What a tool reads: tokens that are to be run, or a stream that was."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array
from arrakis_jax.core.checks import Mask, Tokens, checked_tokens, host
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.stream.fields import SEGMENTED, UNSTACKED
from arrakis_jax.stream.points import kept_tokens, point_fields
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

Step = Callable[[Any, Layer], tuple[Any, Any]]


class Passed(NamedTuple):
    """What a pass over the layers leaves.

    Attributes:
        stream: the stream outside of the layers: embed, final, norm_final_scale, mask.
        state: the last state.
        found: for each segment of layers, what the function found, stacked over its layers.
    """

    stream: ResidualStream
    state: Any
    found: list[Any]

    @property
    def stacked(self) -> Any:
        """What was found, stacked over all layers, where segments do not differ."""
        return jax.tree.map(lambda *x: jnp.concatenate(x), *self.found)


def over_layers(
    model: Transformer,
    source: Array | ResidualStream,
    mask: Array | None,
    fields: tuple[str, ...],
    state: Any,
    step: Step,
) -> Passed:
    """Hands these fields of each layer to `step(state, layer) -> (state, found)`, first to last.

    `source` is token ids `[B,T]`, with their mask, or a captured stream `[L,B,T,...]`, which must
    hold the fields (`embed`, `final` and `norm_final_scale` only where named).
    """
    if not isinstance(source, ResidualStream):
        inside = tuple(name for name in fields if name not in UNSTACKED)
        x_BTD = model.embed(source, mask=mask)
        stream, walked = model.fold(x_BTD, state, step, mask=mask, fields=inside)
        return Passed(stream, *walked)
    source.need("mask", *fields, all_layers=True, all_positions=True)
    inside = [n for n in fields if n not in UNSTACKED and n not in source.lacks]
    told = source.resid_pre is not None and source.final is not None
    posts = source.resid_post if told else None
    found = []
    for i, (blocks, layers) in enumerate(model.stacks()):
        rows = slice(layers.start, layers.stop)
        own = {name: _of(source, name, i, rows) for name in inside}
        own = {name: value for name, value in own.items() if value is not None}

        def stepping(state: Any, xs: tuple) -> tuple[Any, Any]:
            block, index, fields, resid_post = xs
            stream = ResidualStream(
                **fields, mask=source.mask, lacks=source.lacks, normed=source.normed
            )
            return step(state, Layer(block, index, stream, resid_post))

        post = None if posts is None else posts[rows]
        xs = (blocks, jnp.arange(layers.start, layers.stop), own, post)
        state, result = jax.lax.scan(stepping, state, xs)
        found.append(result)
    return Passed(source, state, found)


def _of(stream: ResidualStream, name: str, i: int, rows: slice) -> Any:
    """A field of the layers of segment i."""
    value = getattr(stream, name)
    if name in SEGMENTED and isinstance(value, tuple):
        return value[i]
    return jax.tree.map(lambda x: x[rows], value)


def batch_of(stream: ResidualStream) -> ResidualStream:
    """The stream; ValueError unless it has a batch axis."""
    stream.need("mask")
    if stream.mask.ndim != 2:
        do = "hand over the whole stream, and select from the result"
        got = f"one example, with a mask of shape {stream.mask.shape}"
        raise ValueError(expected("residuals", "a batch, `[B,T]`", got, do))
    return stream


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
        held = kept_tokens(stream, True) if stream.positions is not None else stream.mask
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


def stream_of(source: Any, mask: Mask | None = None) -> ResidualStream | None:
    """The residual stream in a ResidualStream or ModelOutput; None for anything else (tokens).

    Raises:
        ValueError: for a mask that is not the stream's own.
    """
    stream = source.residuals if isinstance(source, ModelOutput) else source
    if not isinstance(stream, ResidualStream):
        return None
    if mask is not None:
        given, own = host(mask), None if stream.mask is None else host(stream.mask)
        if given is not None and own is not None and not np.array_equal(given, own):
            got, do = "another one", "leave it out"
            raise ValueError(expected("mask", "the stream's own, or None", got, do))
    return stream
