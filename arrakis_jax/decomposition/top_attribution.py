"""The largest terms of a logit. They are chosen as the layers run, so the others are not kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_count
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.decomposition.logit_attribution import asked
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source
from arrakis_jax.frozen.reads import StreamReader
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.record import Record
from arrakis_jax.results.table import Table, table_of
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import Kinds
from arrakis_jax.terms.factors import Measured
from arrakis_jax.terms.scan import LayerValues, Readout, labels_of, over_terms, readout_of
from arrakis_jax.terms.stream import embeddings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class TopAttribution(Record):
    """The k terms with the largest shares in a logit or logit difference, in logits.

    Attributes:
        terms: `[k,B]` (`[k,B,T]` for every position), by falling absolute value.
        index: `[k,B]` (`[k,B,T]`), the numbers of the terms: `labels[int(index[i, b])]` names one.
        constant, logit: `[B]` (`[B,T]`), as in LogitAttribution.
        rest: `[B]` (`[B,T]`), `logit - constant - sum(terms)`: the sum of all other terms.
        gap: `[B]` (`[B,T]`), as in LogitAttribution, over all terms.
        labels: the name of each of all C terms.
    """

    terms: Float[Array, "k B"]
    index: Int[Array, "k B"]
    constant: Float[Array, " B"]
    logit: Float[Array, " B"]
    rest: Float[Array, " B"]
    gap: Float[Array, " B"]
    labels: Labels = field(metadata={"static": True})

    def to_table(self) -> Table:
        """One row for each of the k terms of each row of the batch (and position)."""
        axes = ("row", "position")[: self.terms.ndim - 1]
        return table_of(self.terms, self.labels, axes, "value", np.asarray(self.index))


def top_attribution(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    targets: Ids,
    k: int,
    *,
    against: Ids | None = None,
    by: str = "neuron",
    position: int | Array | None = -1,
    layers: tuple[int, ...] | None = None,
    kinds: tuple[str, ...] | None = None,
    mask: Mask | None = None,
    check: bool = False,
) -> TopAttribution:
    """The k largest terms of `logit_attribution`, by absolute value.

    The numbers are those of `logit_attribution(...).top(k)`. But each layer's terms are dropped as
    soon as the largest so far are known. All neurons' terms at every position of a large model
    would not fit in memory.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream.
        targets: token ids, an int or `[B]`; `[B,T]` with `position=None`.
        k: how many terms.
        against: token ids whose logit is subtracted, or None.
        by: "neuron", "source", or any other value that `logit_attribution` takes.
        position: counted in real tokens: an int or `[B]`; None for every position.
        layers: the terms of these layers only.
        kinds: the terms of these kinds only, such as `("neuron",)`.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        A TopAttribution.

    Raises:
        ValueError: if there are fewer than k terms, and as in `logit_attribution`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, _ = encode(tokenizer, "When Mary and John went to the store, John gave it to")
        >>> found = top_attribution(model, tokens, token_id(tokenizer, " Mary"), 3)
        >>> found.terms.shape, found.labels[int(found.index[0, 0])].kind
        ((3, 1), 'attn')

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    question = asked(model, tokens, targets, against=against, by=by, position=position,
                     layers=layers, kinds=kinds, mask=mask, check=check)  # fmt: skip
    checked_count("k", k, 2**31)
    return _find(model, *question.arrays, k=k, **question.static)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Largest:
    """The k largest terms so far, and the sums of all terms so far.

    Attributes:
        size: `[B,T,k]`, absolute values; -1 where there is no term yet.
        value, layer, place: `[B,T,k]`, the terms, their layers (-1 before the layers), and their
            numbers among the terms of their layer.
        total, absolute: `[B,T]`, the sum of all terms and of their absolute values.
        through: `[B,T]`, the product of the factors of all norms on the stream so far.
    """

    size: Array
    value: Array
    layer: Array
    place: Array
    total: Array
    absolute: Array
    through: Array

    @classmethod
    def none(cls, shape: tuple[int, ...], k: int, dtype: Any) -> Largest:
        """The state before any term."""
        # No absolute value is below -1, so every real term displaces an empty place.
        zero, whole = jnp.zeros((*shape, k), dtype), jnp.zeros((*shape, k), int)
        total = jnp.zeros(shape, dtype)
        return cls(zero - 1, zero, whole, whole, total, total, total + 1)

    def past(self, passed: Float[Array, "B T"]) -> Largest:
        """The state after norms on the stream, which multiply all earlier terms.

        The factors are positive, so the k largest terms stay the k largest.
        """
        factor = passed[..., None]
        return replace(
            self,
            size=jnp.where(self.size < 0, self.size, self.size * factor),
            value=self.value * factor,
            total=self.total * passed,
            absolute=self.absolute * passed,
            through=self.through * passed,
        )

    def and_of(
        self, terms_mBT: Float[Array, "m B T"], layer: Array | int, listed: Array | bool = True
    ) -> Largest:
        """The state after these terms of a layer, if the layer is listed."""
        # Whether a layer is listed is traced. A layer that is not gets the size -1, which keeps
        # its terms out, and zeros as terms, which leave the sums as they are.
        terms = jnp.where(listed, jnp.moveaxis(terms_mBT, 0, -1), 0)
        k, places = self.size.shape[-1], jnp.broadcast_to(jnp.arange(terms.shape[-1]), terms.shape)
        size = jnp.where(listed, jnp.abs(terms), -1)
        # The old terms come first, so that of equal terms the earlier one stays.
        size, chosen = jax.lax.top_k(jnp.concatenate([self.size, size], -1), k)

        def merged(old: Array, new: Array) -> Array:
            return jnp.take_along_axis(jnp.concatenate([old, new], -1), chosen, -1)

        return Largest(
            size=size,
            value=merged(self.value, terms),
            layer=merged(self.layer, jnp.full(terms.shape, layer, self.layer.dtype)),
            place=merged(self.place, places.astype(self.place.dtype)),
            total=self.total + terms.sum(-1),
            absolute=self.absolute + jnp.abs(terms).sum(-1),
            through=self.through,
        )


@compiled("columns", "k", "by", "layers", "kinds")
def _find(
    model: Transformer,
    source: Source,
    position: Array | None,
    targets: Array,
    against: Array | None,
    *,
    columns: tuple[int, ...] | None,
    k: int,
    by: str,
    layers: tuple[int, ...] | None,
    kinds: Kinds,
) -> TopAttribution:
    at = columns if columns is not None or position is None else position[..., None]
    readout = readout_of(model, targets, against, position is not None)
    readout.check(model, source)
    reader = StreamReader.of(model, readout.direction)
    ranks = source.ranks(at)

    def step(largest: Largest, layer: LayerValues) -> tuple[Largest, tuple[Measured, ...]]:
        if layer.passed is not None:
            largest = largest.past(layer.passed)
        # The labels need the static kinds, so they leave the scan without any values.
        kinds_only = tuple(Measured(each.value[:0], each.kind) for each in layer.terms)
        if not layer.terms:
            return largest, kinds_only
        terms = jnp.concatenate([each.value for each in layer.terms])
        return largest.and_of(terms, layer.index, layer.listed), kinds_only

    shape = jnp.broadcast_shapes(ranks.shape, readout.offset.shape)
    start = Largest.none(shape, k, model.config.acc)
    stream, walked = over_terms(model, source, reader, start, step, by=by, kinds=kinds,
                                layers=layers, at=at)  # fmt: skip
    names, first = embeddings(model, stream, ranks, kinds)
    labels = labels_of(model, names, walked.by_segment, kinds, layers)
    checked_count("k", k, len(labels))
    # The embedding comes last, when the factor of all norms on the stream is known. The
    # direction's length, which the scan left out, multiplies everything once.
    first = contract("C...D,...D->C...", first, reader.first) * walked.state.through[None]
    largest = walked.state.and_of(first, -1).past(reader.size)
    return _result(model, stream, readout, largest, labels, layers is None and kinds is None)


def _result(
    model: Transformer,
    stream: ResidualStream,
    readout: Readout,
    largest: Largest,
    labels: Labels,
    complete: bool,
) -> TopAttribution:
    # begins[l]: how many terms come before layer l. The embedding has layer -1, which reads the
    # last entry: 0.
    begins = np.zeros(model.config.n_layers + 1, int)
    begin = len(labels.first)
    for segment in labels.segments:
        for layer in segment.layers:
            begins[layer] = begin
            begin += segment.per_layer
    index = jnp.asarray(begins)[largest.layer] + largest.place
    read, real = readout.of(model, stream), stream.mask

    def at_real(x: Array) -> Array:
        return jnp.where(real, x / read.scale, readout.absent)

    terms = jnp.moveaxis(
        jnp.where(real[..., None], largest.value / read.scale[..., None], readout.absent), -1, 0
    )
    total, absolute = at_real(largest.total), at_real(largest.absolute)
    gap = ratio(jnp.abs(total + read.constant - read.logit), absolute)
    result = TopAttribution(
        terms=terms,
        index=jnp.moveaxis(jnp.where(real[..., None], index, 0), -1, 0),
        constant=read.constant,
        logit=read.logit,
        rest=read.logit - read.constant - terms.sum(0),
        gap=gap if complete else jnp.full_like(gap, jnp.nan),
        labels=labels,
    )
    return jax.tree.map(lambda x: x[..., 0], result) if readout.one else result
