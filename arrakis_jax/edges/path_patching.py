"""Exact patching of edges: one reader reads what one writer would have written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Mask, Tokens
from arrakis_jax.core.errors import expected
from arrakis_jax.edges.effects import edge_table
from arrakis_jax.edges.graph import WRITTEN, Edge, Graph, Node, head_changes
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target, read_target
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import at_layer
from arrakis_jax.patching.effects import Effects
from arrakis_jax.patching.pairs import Pair, checked_pair
from arrakis_jax.results.table import Table
from arrakis_jax.stream.fields import READERS
from arrakis_jax.stream.residuals import ResidualStream

# The kinds of writers, and of readers: all but "final" read at the sites in READERS.
WRITERS = ("embed", "mlp", "head")
READER_KINDS = ("q", "k", "v", "mlp", "final")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class PathEffects(Effects):
    """What patching single edges does to a target, of each example.

    Attributes:
        effects: `[N,B]`, in the order of `labels`.
        base: `[B]`, the target of the run that is patched.
        source: `[B]`, the target of the run that patches come from.
        labels: the N edges.
    """

    effects: Float[Array, "N B"]
    base: Float[Array, " B"]
    source: Float[Array, " B"]
    labels: tuple[Edge, ...] = field(metadata={"static": True})

    @property
    def meaning(self) -> str:
        """What the numbers are, in a sentence."""
        return (
            "target with the source run's write in place of the base run's in the input of one "
            "reader, minus the base run's target"
        )

    def to_table(self, k: int | None = None) -> Table:
        """A row for each edge and example, or for the k largest of each example.

        Columns: edge, writer, reader, row, effect.
        """
        return edge_table(self, k)


def path_patching(
    model: Transformer,
    clean: Tokens,
    corrupt: Tokens,
    target: Any,
    *,
    edges: Iterable[tuple[Any, Any]],
    base: str = "clean",
    mask: Mask | None = None,
    check: bool = False,
) -> PathEffects:
    """The effect of patching single edges of the model's graph, exactly.

    For the edge from writer u to reader r, r alone reads the stream with u's write of the source
    run in place of u's write of the base run. Every other reader still reads u's write of the base
    run, and what r changes is followed to the target. `effect = target(patched) - target(base)`. An
    edge to the final norm is the writer's direct effect.

    For each edge only the blocks from the reader's layer on are run, one edge at a time. One
    program serves all lists of equal length.

    Args:
        model: a transformer whose stream is a sum of what is written to it.
        clean: `[B,T]` token ids.
        corrupt: `[B,T]`, the other prompt of each pair, token for token.
        target: what is measured, such as `Logit(3, against=4)`; or token ids; or a function of
            logits.
        edges: pairs of a writer, `(None, "embed")`, `(layer, "head", head)` or `(layer, "mlp")`,
            and a later reader, `(layer, "q", head)` (or "k" and "v", of a key/value head),
            `(layer, "mlp")` or `(None, "final")`; as Nodes or tuples.
        base: the run that is patched, "clean" (with the corrupt run's writes) or "corrupt".
        mask: `[B,T]`, of both prompts.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        PathEffects `[N,B]`, in units of the target.

    Raises:
        TypeError, ValueError, IndexError: for pairs, targets or edges that do not fit, and for a
            model with norms on the stream itself.

    Example:
        >>> model, tokenizer = demo_model()
        >>> clean = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> corrupt = encode(tokenizer, "Alice and Tom met, Alice gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> edges = [((0, "head", 2), (3, "k", 1)), ((3, "mlp"), (None, "final"))]
        >>> paths = path_patching(model, clean, corrupt, Logit(alice, tom), edges=edges)
        >>> paths.effects.shape, str(paths.labels[0])
        ((2, 1), 'L0 head 2 -> L3 k 1')

    Reference:
        Path patching: Wang et al. 2022, "Interpretability in the Wild"; Goldowsky-Dill et al. 2023,
        "Localizing Model Behavior with Path Patching".
    """
    pair = checked_pair(model, clean, corrupt, mask, base=base, check=check)
    graph = Graph.of(model.config)
    target = checked_target(model, pair.base, target, pair.mask)
    labels = checked_edges(graph, edges)
    effects, base_B, source_B = _path_patching(model, pair, target, _Ends.of(graph, labels))
    return PathEffects(effects=effects, base=base_B, source=source_B, labels=labels)


def checked_edges(graph: Graph, edges: Any) -> tuple[Edge, ...]:
    """The edges as nodes of the graph.

    Raises:
        TypeError: for anything but a list of pairs of nodes.
        ValueError: for no edges, or one that the graph does not have.
    """
    labels = []
    for edge in edges if isinstance(edges, Iterable) else (edges,):
        try:
            writer, reader = (Node(*node) for node in edge)
        except (TypeError, ValueError) as error:
            do = "such as ((0, 'head', 2), (3, 'k', 1))"
            raise TypeError(
                expected("edges", "pairs of a writer and a reader", repr(edge), do)
            ) from error
        w, r = graph.index(writer, "writers"), graph.index(reader, "readers")
        edge = Edge(graph.writers[w], graph.readers[r])
        if not graph.edges[r, w]:
            do = "a reader reads what is written before it"
            raise ValueError(expected("edges", "made of edges of the model", str(edge), do))
        labels.append(edge)
    if not labels:
        raise ValueError(expected("edges", "at least one pair", "none", "name an edge"))
    return tuple(labels)


class _Ends(NamedTuple):
    """Where N edges begin and end, as indices; without the N axis for one edge.

    Attributes:
        written: the writer's kind, among WRITERS.
        writer: the writer's layer, and `head` which of its heads.
        kind: the reader's, among READER_KINDS.
        reader: the reader's layer; L for the final norm.
        reader_head: which head reads.
    """

    written: Any
    writer: Any
    head: Any
    kind: Any
    reader: Any
    reader_head: Any

    @classmethod
    def of(cls, graph: Graph, edges: tuple[Edge, ...]) -> _Ends:
        """The ends of these edges."""
        rows = [
            (
                WRITERS.index(w.kind),
                w.layer or 0,
                w.head or 0,
                READER_KINDS.index(r.kind),
                graph.n_layers if r.layer is None else r.layer,
                r.head or 0,
            )
            for w, r in edges
        ]
        return cls(*np.array(rows, np.int32).T)


@dataclass(frozen=True)
class _ReadChange:
    """The edit that adds a change to the input of one reader inside of a layer."""

    at: _Ends
    change: Float[Array, "B T D"]
    reads = READERS  # the sites at which a block must ask for a copy of the stream

    def __call__(self, site: str, layer: Array | None, value: Array) -> Array:
        if site not in READERS:
            return value
        # Layer, kind and head are traced, so every reader asks whether it is the one.
        reads = (layer == self.at.reader) & (self.at.kind == READERS.index(site))
        change = self.change
        if site != "mlp_in":  # of shape [B,T,heads,D]
            heads = jnp.arange(value.shape[2]) == self.at.reader_head
            reads, change = (reads & heads)[None, None, :, None], change[:, :, None]
        return value + jnp.where(reads, change, 0).astype(value.dtype)


@compiled()
def _path_patching(model: Transformer, pair: Pair, target: Target, ends: _Ends) -> tuple:
    mask, n_layers = pair.mask, model.config.n_layers
    assert pair.source is not None  # as checked
    base = model(pair.base, mask=mask, capture=(*WRITTEN, "resid_pre", "final")).residuals
    source = model(pair.source, mask=mask, capture=(*WRITTEN, "final")).residuals
    base_B, source_B = (read_target(model, x.final, mask, target) for x in (base, source))
    # The stream entering each layer, and the final one: where a patched run starts.
    points_PBTD = jnp.concatenate([base.resid_pre, base.final[None]])
    changes = _changes(model, base, source)

    def patched(at: _Ends) -> Float[Array, " B"]:
        # The writer's kind is traced, so that all lists of N edges share one program.
        change_BTD = jax.lax.switch(at.written, changes, at.writer, at.head)
        x_BTD = points_PBTD[at.reader]
        # The final norm reads the point after the last block; inside of blocks an edit reads.
        x_BTD = x_BTD + jnp.where(at.reader == n_layers, change_BTD, 0).astype(x_BTD.dtype)
        edits = (_ReadChange(at, change_BTD),)
        x_BTD = model.blocks_from(x_BTD, at.reader, mask=mask, edits=edits)
        return read_target(model, x_BTD, mask, target)

    return jax.lax.map(patched, ends) - base_B[None], base_B, source_B


def _changes(
    model: Transformer, base: ResidualStream, source: ResidualStream
) -> list[Callable[[Array, Array], Float[Array, "B T D"]]]:
    """What a writer of each kind in WRITERS changes in the stream, from its layer and head."""
    acc = model.config.acc

    def embed(layer: Array, head: Array) -> Array:
        return (source.embed - base.embed).astype(acc)

    def mlp(layer: Array, head: Array) -> Array:
        if base.mlp_out is None:
            return jnp.zeros(base.embed.shape, acc)
        return (source.mlp_out[layer] - base.mlp_out[layer]).astype(acc)

    def one_head(block: Block, layer: Array, head: Array) -> Array:
        return head_changes(block, base.z[layer], source.z[layer], linear=False)[head]

    return [embed, mlp, partial(at_layer, model, one_head)]
