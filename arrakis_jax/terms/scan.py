"""Reads terms along a direction, inside the scan over the layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.source import At, Source
from arrakis_jax.frozen.reads import LayerReader, StreamReader, logit_direction, logit_reader
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.nn.walk import Walked, segment_layers
from arrakis_jax.results.labels import Kind, Labels, Segment
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.capture import WHOLE, Kinds, fields_for
from arrakis_jax.terms.factors import Measured, measured
from arrakis_jax.terms.layer import LayerTerms
from arrakis_jax.terms.stream import check_found


class LogitRead(NamedTuple):
    """A logit, its constant part, which no term writes, and the scale of the final norm."""

    logit: Float[Array, "B T"]
    constant: Float[Array, "B T"]
    scale: Float[Array, "B T"]


class Readout(NamedTuple):
    """A logit, or a difference of two, as a direction of the stream before the final norm.

    Attributes:
        u: `[B,T,D]`, the direction that reads the logit from the normed stream.
        direction: `[B,T,D]`: `norm(x) . u = x . direction / scale + offset`.
        offset: `[B,T]`.
        bias: `[B,T]`, the bias of the unembedding.
        one: whether T is a single position of each row, asked for by its number.
    """

    u: Array
    direction: Array
    offset: Array
    bias: Array
    one: bool

    @property
    def absent(self) -> float:
        """The value where a row lacks a position: NaN if it was asked for by number, else 0."""
        return float("nan") if self.one else 0.0

    def check(self, model: Transformer, source: Source) -> None:
        """Raises NotCapturedError if a captured stream lacks the fields of the readout."""
        if source.captured is not None:
            scale = () if model.norm_final is None else ("norm_final_scale",)
            source.captured.need("final", *scale)

    def of(self, model: Transformer, stream: ResidualStream) -> LogitRead:
        """The logit of a stream at these positions, as the model computes it, before a soft-cap."""
        # The norm is computed again, so that `rest` and `gap` test the terms independently.
        scale = jnp.ones_like(self.offset) if model.norm_final is None else stream.norm_final_scale
        logit = contract("...D,...D->...", model.final_norm(stream.final), self.u) + self.bias
        if "norm_final_scale" in stream.edited:  # the model's own logit has the edited scale
            read = contract("...D,...D->...", stream.final.astype(scale.dtype), self.direction)
            logit = read / scale + self.offset + self.bias
        logit, constant = (
            jnp.where(stream.mask, x, self.absent) for x in (logit, self.offset + self.bias)
        )
        return LogitRead(logit, constant, scale)


def readout_of(model: Transformer, targets: Array, against: Array | None, one: bool) -> Readout:
    """The readout of these targets: `[B]` with one position in each row, else `[B,T]`."""
    if one:
        targets, against = targets[..., None], None if against is None else against[..., None]
    u, bias = logit_reader(model, targets, against)
    return Readout(u, *logit_direction(model, u), bias, one)


class LayerValues(NamedTuple):
    """The terms of one layer along a direction, as they are in the stream after that layer.

    Attributes:
        index: the number of the layer, traced.
        listed: whether the layer was asked for, traced.
        terms: for each kind, `[m,B,T]`.
        passed: `[B,T]`, the factor that this layer's norms on the stream put on all earlier
            terms; None without such norms.
    """

    index: Int[Array, ""]
    listed: Bool[Array, ""]
    terms: tuple[Measured, ...]
    passed: Float[Array, "B T"] | None


def over_terms(
    model: Transformer,
    source: Source,
    reader: StreamReader,
    state: Any,
    step: Callable[[Any, LayerValues], tuple[Any, Any]],
    *,
    by: str,
    kinds: Kinds,
    layers: tuple[int, ...] | None,
    at: At,
) -> tuple[ResidualStream, Walked]:
    """Hands each layer's terms along a direction to a function, in the walk over the layers.

    With norms on the stream, each later layer multiplies a term by its `passed`. So all layers are
    walked then, even if few are asked for.
    """
    config = model.config
    passing = config.norms_stream
    # One entry at least: a model without layers traces the step, and never runs it.
    listed = np.ones(max(config.n_layers, 1), bool)
    if layers is not None:
        listed = np.isin(np.arange(len(listed)), layers)

    def stepping(state: Any, layer: Layer) -> tuple[Any, Any]:
        # Terms are read inside the scan, so heads and neurons exist for one layer at a time.
        at_layer = reader.at(layer)
        terms = along_reader(LayerTerms(config, layer), at_layer, by, kinds)
        passed = at_layer.attn * at_layer.mlp if passing else None
        return step(
            state, LayerValues(layer.index, jnp.asarray(listed)[layer.index], terms, passed)
        )

    return source.over_layers(
        model, fields_for(config, by, kinds), state, stepping,
        layers=None if passing else layers, at=at, whole=WHOLE.get(by, ()),
    )  # fmt: skip


def along_reader(
    writer: LayerTerms, reader: LayerReader, by: str, kinds: Kinds
) -> tuple[Measured, ...]:
    """The terms of one layer along the direction that reads the layer's output.

    A write that a norm of its own layer still changes is read before that norm, times the norm's
    factor. Attention is half 0 of a layer, the MLP half 1.
    """
    halves = writer.halves(by, kinds)
    if not writer.config.norms_stream:
        return measured((*halves[0], *halves[1]), lambda factor: factor.along(reader.post))
    norm_first = writer.config.norm_placement == "stream_before"
    # (direction, factor) of each half: `after_norm` for what is added after the half's norm, such
    # as the norm's own bias; `before_norm` for what that norm still changes.
    after_norm = ((reader.mid, reader.mlp), (reader.post, jnp.ones_like(reader.mlp)))
    before_norm = ((reader.pre, reader.attn * reader.mlp), after_norm[0])
    terms: list[Measured] = []
    for half, written in enumerate(halves):
        direction, factor = (after_norm if norm_first else before_norm)[half]
        values = [Measured(f.along(direction) * factor[None], f.kind) for f in written]
        bias = writer.norm_bias(half)
        if bias is not None and (kinds is None or "norm_bias" in kinds):
            direction, factor = after_norm[half]
            value = Measured(bias.along(direction) * factor[None], bias.kind)
            # In writing order, which is the order of the labels.
            values = [value, *values] if norm_first else [*values, value]
        terms += values
    return tuple(terms)


def labels_of(
    model: Transformer,
    names: tuple[str, ...],
    by_segment: list[tuple[Measured, ...]],
    kinds: Kinds,
    layers: tuple[int, ...] | None,
) -> Labels:
    """The labels of the terms of these layers, from each segment's terms in a walk."""
    walked = segment_layers(model, None if model.config.norms_stream else layers)
    listed = [tuple(i for i in members if layers is None or i in layers) for members in walked]
    segments = map(Segment, listed, map(kinds_of, by_segment))
    labels = Labels(names, tuple(segment for segment in segments if segment.layers))
    check_found(kinds, labels)
    return labels


def kinds_of(terms: tuple[Measured, ...]) -> tuple[Kind, ...]:
    """The kind of each of these terms."""
    return tuple(each.kind for each in terms)
