"""The effects of edges: a number for each pair of a reader and a writer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.edges.graph import Edge, Graph
from arrakis_jax.patching.effects import Effects, effect_rows
from arrakis_jax.results.labels import LazyLabels
from arrakis_jax.results.ranking import Top, top
from arrakis_jax.results.table import Table


def edge_table(effects: Effects, k: int | None, there: Any = None) -> Table:
    """A row for each edge and example, or for the k largest of each example.

    `there` says which of the pairs are edges; None for all.
    """

    def rows() -> Iterator[tuple]:
        for i, row, value in effect_rows(effects.terms, k, there):
            edge = effects.labels[i]
            yield (str(edge), str(edge.writer), str(edge.reader), row, value)

    return Table.of_rows(("edge", "writer", "reader", "row", "effect"), rows())


@dataclass(frozen=True)
class EdgeLabels(LazyLabels[Edge]):
    """All pairs of a reader and a writer: pair `r * W + w` is reader r and writer w."""

    # Made when asked for: a large model has millions of pairs.

    graph: Graph

    def __repr__(self) -> str:
        n_edges = int(self.graph.edges.sum())
        return f"Edges({self.graph.n_readers} readers x {self.graph.n_writers} writers, {n_edges})"

    def __len__(self) -> int:
        return self.graph.n_readers * self.graph.n_writers

    def _label(self, i: int) -> Edge:
        reader, writer = divmod(i, self.graph.n_writers)
        return Edge(self.graph.writers[writer], self.graph.readers[reader])


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class EdgeEffects(Effects):
    """What a patch of each edge alone does to a target, to first order, of each example.

    Attributes:
        effects: `[R,W,B]`, over readers and writers; zero where the graph has no edge.
        base: `[B]`, the target of the run that is patched.
        source: `[B]`, the target of the run that patches come from.
        graph: the readers and writers.
        method: how the effects were found.
    """

    effects: Float[Array, "R W B"]
    base: Float[Array, " B"]
    source: Float[Array, " B"]
    graph: Graph = field(metadata={"static": True})
    method: str = field(default="EAP", metadata={"static": True})

    @property
    def meaning(self) -> str:
        """What the numbers are, in a sentence."""
        return (
            "target with the source run's write in place of the base run's in the input of one "
            f"reader, minus the base run's target, estimated by {self.method}"
        )

    @property
    def labels(self) -> EdgeLabels:
        """The edge of each entry of `effects.reshape(-1, B)`."""
        return EdgeLabels(self.graph)

    def by_writer(self) -> Float[Array, "W B"]:
        """The effect of each writer on all of its readers, to first order."""
        return self.effects.sum(0)

    def top(self, k: int) -> Top:
        """The k effects of largest absolute value of each example, `[k,B]`."""
        edges = jnp.asarray(self.graph.edges.reshape(-1))
        return top(self.terms, k, among=edges, most=int(edges.sum()))

    def to_table(self, k: int | None = None) -> Table:
        """A row for each edge and example, or for the k largest of each example.

        Columns: edge, writer, reader, row, effect.
        """
        return edge_table(self, k, self.graph.edges.reshape(-1))
