"""The largest terms of a logit, found as the layers run, so that the others never exist."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_count
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.decomposition.logit_attribution import LogitAttribution, asked, logit_attribution
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.ranking import top
from arrakis_jax.results.record import Record
from arrakis_jax.results.table import Table, table_of
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import Kinds
from arrakis_jax.terms.factors import Measured
from arrakis_jax.terms.scan import Readout, in_scan, labels_in_scan, outside_of, readout_of
from arrakis_jax.terms.stream import embeddings


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class TopAttribution(Record):
    """The k terms with the largest shares in a logit or logit difference, in logits.

    Attributes:
        terms: `[k,B]` (`[k,B,T]` for every position), by falling absolute value.
        index: `[k,B]` (`[k,B,T]`), which terms: `labels[int(index[i, b])]` says what each is.
        constant, logit: `[B]` (`[B,T]`), as in LogitAttribution.
        rest: `[B]` (`[B,T]`), `logit - constant - sum(terms)`: what all others wrote.
        gap: `[B]` (`[B,T]`), as in LogitAttribution, over all terms.
        labels: what each of all C terms is.
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
    """The k largest of the terms of `logit_attribution`, by absolute value.

    The same numbers as `logit_attribution(...).top(k)`, but each layer's terms are dropped as
    soon as the largest so far are known: at every position of a large model, all of its neurons'
    terms would not fit in memory.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream.
        targets: token ids, an int or `[B]`; `[B,T]` with `position=None`.
        k: how many terms.
        against: token ids whose logit is subtracted, or None.
        by: "neuron", "source", or any other that `logit_attribution` takes.
        position: counted in real tokens: an int or `[B]`; None for every position.
        layers: the terms of these layers only.
        kinds: the terms of these kinds only, such as `("neuron",)`.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        A TopAttribution.

    Raises:
        ValueError: if there are fewer than k terms; and as `logit_attribution`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, _ = encode(tokenizer, "When Mary and John went to the store, John gave it to")
        >>> found = top_attribution(model, tokens, token_id(tokenizer, " Mary"), 3)
        >>> found.terms.shape, found.labels[int(found.index[0, 0])].kind
        ((3, 1), 'attn')

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    ask = asked(model, tokens, targets, against=against, by=by, position=position, layers=layers,
                kinds=kinds, mask=mask, check=check)  # fmt: skip
    checked_count("k", k, 2**31)
    if ask.stream is None and layers is None and not model.config.norms_stream:
        about = (ask.position, ask.targets, ask.against)
        return _run_and_find(
            model, ask.tokens, ask.mask, *about, k=k, by=by, kinds=ask.options["kinds"]
        )
    found = logit_attribution(model, tokens, targets, against=against, by=by, position=position,
                              layers=layers, kinds=kinds, mask=mask, check=check)  # fmt: skip
    return _selected(found, k)


def _selected(found: LogitAttribution, k: int) -> TopAttribution:
    """The k largest terms of an attribution that has them all."""
    terms, index = top(found.terms, k)
    rest = found.logit - found.constant - terms.sum(0)
    about: dict[str, Any] = {n: getattr(found, n) for n in ("constant", "logit", "gap", "labels")}
    return TopAttribution(terms=terms, index=index, rest=rest, **about)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Largest:
    """The k largest terms so far, and the sums of all.

    Attributes:
        size: `[B,T,k]`, absolute values; -1 where there was none yet.
        value, layer, place: `[B,T,k]`, the terms, their layers (-1 before the layers), and which
            of their layer's terms they are.
        total, absolute: `[B,T]`, the sum of all terms and of their absolute values.
    """

    size: Array
    value: Array
    layer: Array
    place: Array
    total: Array
    absolute: Array

    @classmethod
    def none(cls, shape: tuple[int, ...], k: int, dtype: Any) -> "Largest":
        """Before any term."""
        zero, whole = jnp.zeros((*shape, k), dtype), jnp.zeros((*shape, k), int)
        total = jnp.zeros(shape, dtype)
        return cls(zero - 1, zero, whole, whole, total, total)

    def and_of(self, terms_mBT: Float[Array, "m B T"], layer: Array | int) -> "Largest":
        """After these terms of a layer."""
        terms = jnp.moveaxis(terms_mBT, 0, -1)
        k, padding = self.size.shape[-1], jnp.broadcast_to(jnp.arange(terms.shape[-1]), terms.shape)
        size = jnp.concatenate([self.size, jnp.abs(terms)], -1)
        size, chosen = jax.lax.top_k(size, k)

        def merged(old: Array, new: Array) -> Array:
            return jnp.take_along_axis(jnp.concatenate([old, new], -1), chosen, -1)

        return Largest(
            size=size,
            value=merged(self.value, terms),
            layer=merged(self.layer, jnp.full(terms.shape, layer, self.layer.dtype)),
            place=merged(self.place, padding.astype(self.place.dtype)),
            total=self.total + terms.sum(-1),
            absolute=self.absolute + jnp.abs(terms).sum(-1),
        )


@compiled("k", "by", "kinds")
def _run_and_find(model, tokens, mask, position, targets, against, *, k, by, kinds):
    padding = Padding.of(tokens.shape, mask)
    at = None if position is None else position[:, None]
    number = padding.rank if at is None else padding.counted(at)
    reading = readout_of(model, targets, against, at is not None)
    shape = jnp.broadcast_shapes(number.shape, reading.offset.shape)

    def step(state: Largest, layer: Layer, found: tuple[Measured, ...]) -> tuple[Largest, Any]:
        kinds_only = tuple(Measured(each.value[:0], each.kind) for each in found)
        if not found:
            return state, kinds_only
        terms = jnp.concatenate([each.value for each in found])
        return state.and_of(terms, layer.index), kinds_only

    passed = in_scan(model, tokens, mask, at, reading.direction, by=by, kinds=kinds,
                     state=Largest.none(shape, k, model.config.acc), step=step)  # fmt: skip
    stream = outside_of(passed, padding, at)
    names, first = embeddings(model, stream, number, kinds)
    labels = labels_in_scan(model, names, passed.found, kinds)
    checked_count("k", k, len(labels))
    first = contract("C...D,...D->C...", first, reading.direction)
    largest = passed.state.and_of(first, -1)
    return _result(model, stream, reading, largest, labels, kinds)


def _result(
    model: Transformer,
    stream: ResidualStream,
    reading: Readout,
    largest: Largest,
    labels: Labels,
    kinds: Kinds,
) -> TopAttribution:
    starts, start = [], len(labels.first)
    for segment in labels.segments:
        starts += [start + i * segment.per_layer for i in range(len(segment.layers))]
        start += len(segment.layers) * segment.per_layer
    base = jnp.asarray(np.array([*starts, 0]))[largest.layer]  # the last: before the layers
    read = reading.of(model, stream)

    def of_terms(x: Array) -> Array:
        return jnp.where(stream.mask, x / read.scale, reading.absent)

    terms = jnp.moveaxis(
        jnp.where(stream.mask[..., None], largest.value / read.scale[..., None], reading.absent),
        -1, 0,
    )  # fmt: skip
    total, absolute = of_terms(largest.total), of_terms(largest.absolute)
    gap = ratio(jnp.abs(total + read.constant - read.logit), absolute)
    result = TopAttribution(
        terms=terms,
        index=jnp.moveaxis(jnp.where(stream.mask[..., None], base + largest.place, 0), -1, 0),
        constant=read.constant,
        logit=read.logit,
        rest=read.logit - read.constant - terms.sum(0),
        gap=gap if kinds is None else jnp.full_like(gap, jnp.nan),
        labels=labels,
    )
    return jax.tree.map(lambda x: x[..., 0], result) if reading.one else result
