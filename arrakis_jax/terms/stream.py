"""The terms that a stream is the sum of: what direct.py, readout.py and change.py stand on."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.results.labels import Kind, Labels, Segment
from arrakis_jax.stream.fields import UNSTACKED
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.capture import Kinds, fields_for
from arrakis_jax.terms.factors import AnyFactor, Factor
from arrakis_jax.terms.layer import (
    ATTENTION_KINDS,
    FIRST_KINDS,
    KINDS,
    MLP_KINDS,
    LayerTerms,
    wants,
)
from arrakis_jax.terms.stream_norms import StreamNorms


class Span(NamedTuple):
    """Which writes: of how many layers attention and MLP stand before it, and before its end."""

    ends: tuple[int, int]
    begins: tuple[int, int] = (0, 0)


class Summands(NamedTuple):
    """The terms before the layers, those of each segment of layers, and what they are."""

    first: Array
    layered: tuple[tuple[AnyFactor, ...], ...]
    labels: Labels


def terms(
    model: Transformer,
    stream: ResidualStream,
    position: Int[Array, "..."],
    span: Span,
    *,
    by: str,
    layers: tuple[int, ...] | None = None,
    kinds: Kinds = None,
    origin: Float[Array, "B T D"] | None = None,
) -> Summands:
    """The terms written in a span of the model. The stream may have any axes between L and D.

    `origin` is the stream where a span begins that does not begin with the embedding.
    """
    config = model.config
    stream.need(
        *fields_for(config, by, kinds),
        all_layers=config.stream_dtype is not None or config.norms_stream,
    )
    ends, begins = span
    listed = range(min(begins), ends[0])
    wanted = tuple(listed) if layers is None else tuple(i for i in layers if i in listed)
    carry = StreamNorms(model, stream, sum(ends)) if config.norms_stream and sum(ends) else None
    names, first = _before(model, stream, position, kinds, carry, sum(begins), origin)

    layered, segments, dropped, skipped = [], [], 0, 0
    for i, (block, own) in enumerate(model.stacks()):
        here = tuple(layer for layer in wanted if layer in own)
        if not here:
            continue
        before, after = _stacked(model, stream, i, block, own, here, by, kinds)
        if carry is not None:
            before, after = carry.terms(before, here, 0), carry.terms(after, here, 1)
        before, after = (
            tuple(f for f in half if kinds is None or f.kind.name in kinds)
            for half in (before, after)
        )
        written = sum(layer < ends[1] for layer in here) if after else len(here)
        dropped += (len(here) - written) * sum(f.kind.count for f in after)
        if here[0] < begins[0]:
            skipped = sum(f.kind.count for f in before)
        after = jax.tree.map(lambda x, n=written: x[:n], after)
        segments.append(Segment(here, tuple(f.kind for f in (*before, *after))))
        layered.append((*before, *after))
    labels = Labels(names, tuple(segments), dropped=dropped, skipped=skipped)
    check_found(kinds, labels)
    return Summands(first, tuple(layered), labels)


def checked_kinds(kinds: Any) -> Kinds:
    """A selection of kinds as a tuple; TypeError or ValueError for what is none."""
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
    """Raises ValueError if kinds were asked for of which there are no terms."""
    found = {k.name for segment in labels.segments for k in segment.kinds} | set(labels.first)
    absent = [kind for kind in kinds or () if kind not in found]
    if absent:
        do = (
            f"this model, `by` or span has no such terms; of those asked for it has {sorted(found)}"
        )
        raise ValueError(expected("kinds", "kinds of terms that there are", absent, do))


def _before(
    model: Transformer,
    stream: ResidualStream,
    position: Array,
    kinds: Kinds,
    carry: StreamNorms | None,
    start: int,
    origin: Array | None,
) -> tuple[tuple[str, ...], Array]:
    """What is there before the layers: the embeddings, or where a span begins later, nothing.

    But for what norms on the stream change of the stream there, which is a term of its own.
    """
    acc = model.config.acc
    if origin is not None:
        names, first = ("norm",), origin[None].astype(acc)
        if carry is None:
            return (), first[:0]
    else:
        names, first = embeddings(model, stream, position)
    if carry is not None:
        whole = Factor(first, None, Kind("embed"))
        carried = carry(whole, np.full(len(names), start)).coefficient
        first = carried if origin is None else carried - first
    return _kept(names, first, kinds)


def _kept(names: tuple[str, ...], first: Array, kinds: Kinds) -> tuple[tuple[str, ...], Array]:
    """Those of the terms that are of these kinds."""
    kept = [i for i, name in enumerate(names) if kinds is None or name in kinds]
    return tuple(names[i] for i in kept), first[np.array(kept, int)]


def embeddings(
    model: Transformer, stream: ResidualStream, position: Array, kinds: Kinds = None
) -> tuple[tuple[str, ...], Float[Array, "n B T D"]]:
    """The terms of the embedding that are of these kinds, and their kinds."""
    first = stream.embed[None].astype(model.config.acc)
    if model.w_pos is None:
        return _kept(FIRST_KINDS[:1], first, kinds)
    pos = jnp.where(stream.mask[..., None], model.embed_positions(position), 0)
    return _kept(FIRST_KINDS, jnp.stack([stream.embed - pos, pos]), kinds)


def _stacked(
    model: Transformer,
    stream: ResidualStream,
    i: int,
    block: Block,
    own: range,
    listed: tuple[int, ...],
    by: str,
    kinds: Kinds,
) -> tuple[tuple[AnyFactor, ...], tuple[AnyFactor, ...]]:
    """The terms of attention and of the MLP of these layers of segment i, stacked."""
    config = model.config
    rows = _rows(stream, config, listed)
    local = [i for i in stream.layers if i in own] if stream.layers is not None else own
    local_rows = _places(local, listed)
    fields = {}
    for name in fields_for(config, by, kinds):
        value = getattr(stream, name)
        if name in UNSTACKED or value is None:
            continue
        if isinstance(value, tuple):
            fields[name] = jax.tree.map(lambda x: x[local_rows], value[i])
        else:
            fields[name] = jax.tree.map(lambda x: x[rows], value)
    blocks = jax.tree.map(lambda w: w[_places(own, listed)], block)
    post = stream.resid_post[rows] if config.stream_dtype else None

    def one(block: Block, fields: dict[str, Any], post: Any) -> tuple:
        about: dict[str, Any] = {n: getattr(stream, n) for n in ("mask", "lacks", "normed")}
        part = LayerTerms(
            config, Layer(block, jnp.zeros((), int), ResidualStream(**fields, **about), post)
        )
        before = part.attention(by) if wants(kinds, ATTENTION_KINDS) else ()
        return before, part.mlp(by) if wants(kinds, MLP_KINDS) else ()

    return jax.vmap(one)(blocks, fields, post)


def _rows(stream: ResidualStream, config: ModelConfig, listed: tuple[int, ...]) -> Any:
    """Where these layers stand on the L axis of the stream."""
    held = range(config.n_layers) if stream.layers is None else stream.layers
    if not set(listed) <= set(held):
        stream.need(all_layers=True)
    return _places(held, listed)


def _places(held: Any, wanted: tuple[int, ...]) -> slice | np.ndarray:
    """Where these layers stand among others, as a slice if they follow one another."""
    rows = [list(held).index(layer) for layer in wanted]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return np.array(rows)
