"""The terms whose sum is the stream, as factors stacked over the layers."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.source import captured_layer, layer_ends, layer_fields
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Place, all_at_once, segment_layers
from arrakis_jax.results.labels import Kind, Labels, Segment
from arrakis_jax.stream.fields import UNSTACKED
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.capture import Kinds, fields_for
from arrakis_jax.terms.factors import AnyFactor, Factor
from arrakis_jax.terms.layer import FIRST_KINDS, KINDS, LayerTerms, of_kinds
from arrakis_jax.terms.points import Span
from arrakis_jax.terms.stream_norms import StreamNorms


class Summands(NamedTuple):
    """The terms before the layers, the terms of each segment of layers, and the labels of all."""

    first: Array
    layered: tuple[tuple[AnyFactor, ...], ...]
    labels: Labels


def terms(
    model: Transformer,
    stream: ResidualStream,
    ranks: Int[Array, "..."],
    span: Span,
    *,
    by: str,
    layers: tuple[int, ...] | None = None,
    kinds: Kinds = None,
    origin: Float[Array, "B T D"] | None = None,
) -> Summands:
    """The terms written in a span of the model. The stream may have any axes between L and D.

    Args:
        model: the transformer.
        stream: the stream at the positions asked for.
        ranks: how many real tokens come before each position.
        span: the range of writes.
        by: the granularity of the terms.
        layers: the layers to list; None for all.
        kinds: the kinds to list; None for all.
        origin: the stream where the span begins; None for a span that begins before the embedding.
    """
    config, (begin, end) = model.config, span
    fields = fields_for(config, by, kinds)
    stream.need(*fields, all_layers=config.stream_dtype is not None or config.norms_stream)
    # A span that begins at resid_mid lists that layer too, because its MLP is still to come.
    listed = range(min(begin), end.attn)
    wanted = tuple(listed) if layers is None else tuple(i for i in layers if i in listed)
    # Two norms a layer, so the norms before a point are as many as the writes before it.
    n_norms = sum(end) if config.norms_stream else 0
    norms = StreamNorms(model, stream, n_norms) if n_norms else None
    names, first = _before(model, stream, ranks, kinds, norms, sum(begin), origin)

    def layer_terms(place: Place, x: tuple) -> tuple[tuple[AnyFactor, ...], ...]:
        return LayerTerms(config, captured_layer(stream, place, *x)).halves(by, kinds)

    inside = tuple(name for name in fields if name not in UNSTACKED)
    ends = layer_ends(stream, wanted) if config.stream_dtype else None
    xs = (layer_fields(model, stream, inside, wanted), ends)
    by_segment = all_at_once(model, layer_terms, xs, layers=wanted)

    layered, segments, dropped, skipped = [], [], 0, 0
    for members, (before, after) in zip(segment_layers(model, wanted), by_segment, strict=True):
        if norms is not None:
            before = of_kinds(norms.terms(before, members, 0), kinds)
            after = of_kinds(norms.terms(after, members, 1), kinds)
        # A span that ends at resid_mid lacks the last MLP: `dropped` counts its terms. A span that
        # begins there lacks the first attention, whose terms `skipped` counts.
        written = sum(layer < end.mlp for layer in members) if after else len(members)
        dropped += (len(members) - written) * sum(f.kind.count for f in after)
        if members[0] < begin.attn:
            skipped = sum(f.kind.count for f in before)
        after = jax.tree.map(lambda x, n=written: x[:n], after)
        segments.append(Segment(members, tuple(f.kind for f in (*before, *after))))
        layered.append((*before, *after))
    labels = Labels(names, tuple(segments), dropped=dropped, skipped=skipped)
    check_found(kinds, labels)
    return Summands(first, tuple(layered), labels)


def checked_kinds(kinds: Any) -> Kinds:
    """A selection of kinds as a tuple; TypeError or ValueError if it is not a selection."""
    if kinds is None:
        return None
    named = isinstance(kinds, Iterable) and not isinstance(kinds, str)
    if not named or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(expected("kinds", "a tuple of names", repr(kinds), "such as ('head',)"))
    kinds = tuple(dict.fromkeys(kinds))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise ValueError(expected("kinds", f"made of {KINDS}", unknown or kinds, "name some"))
    return kinds


def check_found(kinds: Kinds, labels: Labels) -> None:
    """Raises ValueError if a kind was asked for that has no terms."""
    present = {k.name for segment in labels.segments for k in segment.kinds} | set(labels.first)
    absent = [kind for kind in kinds or () if kind not in present]
    if absent:
        do = (
            "this model, `by` or span has no such terms; of those asked for it has "
            f"{sorted(present)}"
        )
        raise ValueError(expected("kinds", "kinds of terms that there are", absent, do))


def _before(
    model: Transformer,
    stream: ResidualStream,
    ranks: Array,
    kinds: Kinds,
    norms: StreamNorms | None,
    start: int,
    origin: Array | None,
) -> tuple[tuple[str, ...], Array]:
    """The terms before the layers: the embeddings; nothing for a span that begins later.

    In a later span, norms on the stream change the stream at its begin: that change is a term.
    """
    acc = model.config.acc
    if origin is not None:
        names, first = ("norm",), origin[None].astype(acc)
        if norms is None:
            return (), first[:0]
    else:
        names, first = embeddings(model, stream, ranks)
    if norms is not None:
        whole = Factor(first, None, Kind("embed"))
        carried = norms(whole, np.full(len(names), start)).coefficient
        first = carried if origin is None else carried - first
    return _kept(names, first, kinds)


def _kept(names: tuple[str, ...], first: Array, kinds: Kinds) -> tuple[tuple[str, ...], Array]:
    """The terms of these kinds, with their names."""
    kept = [i for i, name in enumerate(names) if kinds is None or name in kinds]
    return tuple(names[i] for i in kept), first[np.array(kept, int)]


def embeddings(
    model: Transformer, stream: ResidualStream, ranks: Array, kinds: Kinds = None
) -> tuple[tuple[str, ...], Float[Array, "n B T D"]]:
    """The embedding terms of these kinds, and their kinds."""
    first = stream.embed[None].astype(model.config.acc)
    if model.w_pos is None:
        return _kept(FIRST_KINDS[:1], first, kinds)
    # The token's embedding is the rest of `embed`, so that both terms sum to it after any edit.
    pos = jnp.where(stream.mask[..., None], model.embed_positions(ranks), 0)
    return _kept(FIRST_KINDS, jnp.stack([stream.embed - pos, pos]), kinds)
