"""What a tool reads: tokens that are to be run, or a stream that was."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import Mask, Tokens, checked_tokens, host
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.nn.walk import PerSegment, Place, Walked, rows_of, segment_layers, walk
from arrakis_jax.stream.capture import Capture
from arrakis_jax.stream.fields import SEGMENTED, UNSTACKED
from arrakis_jax.stream.padding import Padding, select_positions
from arrakis_jax.stream.points import kept_tokens, point_fields
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

LayerStep = Callable[[Any, Layer], tuple[Any, Any]]


At = Int[Array, "B N"] | tuple[int, ...] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Source:
    """What a tool reads: token ids that are to be run, or a stream that was captured.

    Positions `at` are counted in real tokens: `[B,N]`; a tuple, the same for every row; or None.

    Attributes:
        tokens: `[B,T]`; None with a captured stream.
        mask: `[B,T]`, True at real tokens; None when all are.
        captured: the captured stream; None with tokens.
    """

    tokens: Any
    mask: Bool[Array, "B T"] | None
    captured: ResidualStream | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[B,T]` of the tokens, even if only some positions were captured."""
        return self.tokens.shape if self.captured is None else self.captured.mask.shape

    @property
    def padding(self) -> Padding:
        """Where the real tokens stand."""
        return Padding.of(self.shape, self.mask)

    @property
    def held(self) -> tuple[int, ...] | None:
        """The positions that were captured; None if all were."""
        return None if self.captured is None else self.captured.positions

    def ranks(self, at: At = None) -> Int[Array, "B N"]:
        """Each of these positions, counted from its row's first real token."""
        return self.padding.rank if at is None else self.padding.counted(jnp.asarray(at, int))

    def stream(
        self,
        model: Transformer,
        fields: tuple[str, ...],
        *,
        layers: tuple[int, ...] | None = None,
        at: At = None,
        whole: tuple[str, ...] = (),
    ) -> ResidualStream:
        """The stream with these fields, run for them or captured before.

        Args:
            model: the transformer.
            fields: the names of ResidualStream fields.
            layers: the layers that a run keeps; a captured stream keeps its own.
            at: the positions; None for all (of a captured stream, those that it has).
            whole: the fields that keep all positions.
        """
        if self.captured is not None:
            stream = self.captured
            stream.need("mask", *fields)
            return stream if at is None else stream.at(at, whole=whole)
        return model.after_embedding(
            model.embed(self.tokens, mask=self.mask),
            mask=self.mask,
            capture=Capture(fields, layers=layers),
            at=self._each_row(at),
            whole=whole,
        ).residuals

    def over_layers(
        self,
        model: Transformer,
        fields: tuple[str, ...],
        state: Any,
        step: LayerStep,
        *,
        layers: tuple[int, ...] | None = None,
        at: At = None,
        whole: tuple[str, ...] = (),
    ) -> tuple[ResidualStream, Walked]:
        """Hands these fields of each layer to `step(state, layer) -> (state, found)`.

        Tokens are run: a layer's fields are freed after its step, unless the step returns them.
        With `layers` the model is run first, and keeps the fields of these layers alone; then
        `step` goes over them.

        Returns:
            The stream outside of the layers (embed, final, norm_final_scale, mask), and the walk.
        """
        if self.captured is not None and at is None:
            self.captured.need(all_positions=True)
        if self.captured is not None or layers is not None:
            # A layer's rounding is the difference of neighbouring layers, so all are kept.
            kept = None if model.config.stream_dtype else layers
            needed = (*fields, *(() if self.captured is not None else UNSTACKED))
            stream = self.stream(model, needed, layers=kept, at=at, whole=whole)
            return stream, over_captured(model, stream, fields, state, step, layers)
        inside = tuple(name for name in fields if name not in UNSTACKED)
        wanted = self._each_row(at)
        index, valid = (None, None) if wanted is None else self.padding.columns(wanted)

        def at_positions(state: Any, layer: Layer) -> tuple[Any, Any]:
            if index is None or valid is None:
                return step(state, layer)
            stream = layer.stream.picked(index, valid, whole=whole, stacked=False)
            post = select_positions(layer.resid_post, index, valid, 1)
            return step(state, layer._replace(stream=stream, resid_post=post))

        x_BTD = model.embed(self.tokens, mask=self.mask)
        stream, walked = model.fold(x_BTD, state, at_positions, mask=self.mask, fields=inside)
        if index is not None and valid is not None:
            stream = stream.picked(index, valid)
        return stream, walked

    def _each_row(self, at: At) -> Int[Array, "B N"] | None:
        """The positions with a row for each row of tokens."""
        if at is None:
            return None
        wanted = jnp.asarray(at, int)
        return jnp.broadcast_to(wanted, (self.shape[0], wanted.shape[-1]))


def source_of(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    mask: Mask | None = None,
    *,
    check: bool = False,
    name: str = "tokens",
    batch: bool = False,
) -> Source:
    """The source of a tool, checked before any work.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.
        name: what the tool calls `tokens`.
        batch: whether a stream must have a batch axis.

    Raises:
        TypeError, ValueError: for tokens or a mask that do not fit the model or one another.
        NotCapturedError: for a stream without its mask.
    """
    stream = stream_of(tokens, mask)
    if stream is None:
        tokens, mask = checked_tokens(model.config, tokens, mask, check=check, name=name)
        return Source(tokens=tokens, mask=mask, captured=None)
    stream = batch_of(stream) if batch else stream
    stream.need("mask")
    return Source(tokens=None, mask=stream.mask, captured=stream)


def over_captured(
    model: Transformer,
    stream: ResidualStream,
    fields: tuple[str, ...],
    state: Any,
    step: LayerStep,
    layers: tuple[int, ...] | None = None,
) -> Walked:
    """A walk over layers that were captured: no layer is run again."""
    stream.need("mask", *fields, all_layers=layers is None)
    inside = tuple(n for n in fields if n not in UNSTACKED and n not in stream.lacks)

    def stepping(state: Any, place: Place, x: tuple) -> tuple[Any, Any]:
        return step(state, captured_layer(stream, place, *x))

    xs = (layer_fields(model, stream, inside, layers), layer_ends(stream, layers))
    return walk(model, stepping, state, xs, layers=layers)


def captured_layer(
    stream: ResidualStream, place: Place, fields: dict[str, Any], resid_post: Array | None
) -> Layer:
    """One layer of a captured stream, with these of its fields."""
    fields = {name: value for name, value in fields.items() if value is not None}
    facts: dict[str, Any] = {n: getattr(stream, n) for n in ("mask", "lacks", "normed", "edited")}
    return Layer(place.block, place.index, ResidualStream(**fields, **facts), resid_post)


def layer_fields(
    model: Transformer,
    stream: ResidualStream,
    names: tuple[str, ...],
    layers: tuple[int, ...] | None,
) -> dict[str, Any]:
    """These fields of these layers, as `walk` takes them."""
    all_layers = range(model.config.n_layers)
    held = all_layers if stream.layers is None else stream.layers
    wanted = all_layers if layers is None else layers
    if not set(wanted) <= set(held):
        stream.need(all_layers=True)

    def rows_at(value: Any, rows: Any) -> Any:
        return value if rows is None else jax.tree.map(lambda x: x[rows], value)

    def of_layers(name: str) -> Any:
        value = getattr(stream, name)
        if not (name in SEGMENTED and isinstance(value, tuple)):
            return rows_at(value, rows_of(held, wanted))
        segments = segment_layers(model)
        rows = [
            rows_of([i for i in held if i in own], [i for i in wanted if i in own])
            for own in segments
        ]
        return PerSegment(tuple(map(rows_at, value, rows)))

    return {name: of_layers(name) for name in names if getattr(stream, name) is not None}


def layer_ends(
    stream: ResidualStream, layers: tuple[int, ...] | None
) -> Float[Array, "L B T D"] | None:
    """The stream leaving each of these layers; None without `resid_pre` of all and `final`."""
    if stream.layers is not None or stream.resid_pre is None or stream.final is None:
        return None
    return stream.resid_post if layers is None else stream.resid_post[np.array(layers)]


def batch_of(stream: ResidualStream) -> ResidualStream:
    """The stream; ValueError unless it has a batch axis."""
    stream.need("mask")
    if stream.mask.ndim != 2:
        do = "hand over the whole stream, and select from the result"
        got = f"one example, with a mask of shape {stream.mask.shape}"
        raise ValueError(expected("residuals", "a batch, `[B,T]`", got, do))
    return stream


def point_source(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    mask: Mask | None,
    check: bool,
    *,
    first: bool,
    least: int = 0,
) -> Source:
    """The source of a method that goes over stream points, whose fields it must hold.

    Raises ValueError if fewer tokens are kept than the `least` that the method needs.
    """
    source = source_of(model, tokens, mask, check=check)
    kept = source.mask
    if source.captured is not None:
        source.captured.need(*point_fields(model.config), all_layers=True)
        kept = kept_tokens(source.captured, True) if source.held is not None else kept
    _check_enough(source.shape if kept is None else kept.shape, kept, first, least)
    return source


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
