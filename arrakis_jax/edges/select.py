"""Which edges make a circuit: the largest, or the largest that are connected to the output."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from arrakis_jax.core.checks import checked_numbers
from arrakis_jax.core.errors import expected
from arrakis_jax.edges.graph import Graph, Node

_ORDERS = ("absolute", "signed")


def top_edges(scores: Any, n: int, graph: Graph, *, by: str = "absolute") -> np.ndarray:
    """The n edges of the largest scores, as a bool mask `[R,W]`.

    Of equal scores the first by reader, then by writer.

    Args:
        scores: `[R,W]`, a score for each reader and writer; read where there is an edge.
        n: how many.
        graph: the model's, such as `EdgeEffects.graph` or `Graph.of(config)`.
        by: the order: "absolute" values, or "signed", the scores themselves.

    Raises:
        ValueError: for scores of another shape or that are not finite, and for more edges than
            there are.
    """
    scores_RW = _checked(scores, n, graph, by)
    chosen = np.zeros(scores_RW.size, bool)
    # A stable sort of negated scores: the first of equal ones stays first.
    chosen[np.argsort(-scores_RW.reshape(-1), kind="stable")[:n]] = True
    return chosen.reshape(scores_RW.shape)


def greedy_edges(scores: Any, n: int, graph: Graph, *, by: str = "absolute") -> np.ndarray:
    """N edges that are all connected to the output, as a bool mask `[R,W]`.

    The largest edge whose reader is connected is added again and again, from the final norm on. An
    edge also connects the readers of its writer (a key/value head with any of its query heads).

    Args:
        scores: `[R,W]`, a score for each reader and writer; read where there is an edge.
        n: how many.
        graph: the model's.
        by: the order: "absolute" values, or "signed", the scores themselves.

    Raises:
        ValueError: as `top_edges`.

    Reference:
        Hanna et al. 2024, section 3.
    """
    scores_RW = _checked(scores, n, graph, by)
    chosen = np.zeros(scores_RW.shape, bool)
    # A heap of the edges of connected readers; scores are negated, since the least comes first.
    candidates: list[tuple[float, int, int]] = []
    connected: set[int] = set()

    def connect(reader: int) -> None:
        if reader not in connected:
            connected.add(reader)
            for writer in np.flatnonzero(graph.edges[reader]):
                heapq.heappush(candidates, (-scores_RW[reader, writer], reader, int(writer)))

    readers_of = _readers_of(graph)
    connect(graph.n_readers - 1)
    # n is at most the number of edges, and the final norm reaches them all: never empty.
    for _ in range(n):
        _, reader, writer = heapq.heappop(candidates)
        chosen[reader, writer] = True
        for reader_of_writer in readers_of[writer]:
            connect(reader_of_writer)
    return chosen


def pruned(mask: Any, graph: Graph) -> np.ndarray:
    """The circuit without edges that are on no path from the embedding to the output.

    Args:
        mask: `[R,W]` bool, the edges of a circuit.
        graph: the model's.
    """
    mask = np.asarray(mask, bool) & graph.edges
    readers_of, n = _readers_of(graph), graph.n_writers
    reached, leads = np.zeros(n, bool), np.zeros(n, bool)
    leading = np.zeros(graph.n_readers, bool)
    # Two passes: which writers the embedding reaches, and which lead to the output.
    reached[0] = leading[-1] = True
    for writer in range(1, n):  # in the order of their writes, so that earlier ones are settled
        reached[writer] = (mask[readers_of[writer]] & reached).any()
    for writer in reversed(range(n)):
        leads[writer] = (mask[:, writer] & leading).any()
        leading[readers_of[writer]] |= leads[writer]
    return mask & reached & leading[:, None]


def _readers_of(graph: Graph) -> list[list[int]]:
    """For each writer, the readers that belong to it: a head's query, key and value, or the MLP."""
    where = {reader: r for r, reader in enumerate(graph.readers)}
    group = graph.n_heads // graph.n_kv_heads
    readers_of: list[list[int]] = []
    for layer, kind, head in graph.writers:
        nodes: list[Node] = []
        if kind == "head" and head is not None:
            nodes = [Node(layer, "q", head)]
            nodes += [Node(layer, kind, head // group) for kind in ("k", "v")]
        elif kind == "mlp":
            nodes = [Node(layer, "mlp")]
        readers_of.append([where[node] for node in nodes])
    return readers_of


def _checked(scores: Any, n: int, graph: Graph, by: str) -> np.ndarray:
    """The scores in the order asked for, -inf where there is no edge."""
    if by not in _ORDERS:
        raise ValueError(expected("by", f"one of {_ORDERS}", repr(by), "choose one of them"))
    do = "such as edge_attribution(...).effects.mean(-1)"
    scores_RW = np.asarray(checked_numbers("scores", scores, do))
    if scores_RW.shape != graph.edges.shape:
        must, do = f"of shape {graph.edges.shape}", "take the mean over examples"
        raise ValueError(expected("scores", must, f"shape {scores_RW.shape}", do))
    if not np.isfinite(scores_RW[graph.edges]).all():
        do = "look at what made them"
        raise ValueError(expected("scores", "finite", "NaN or infinity", do))
    most = int(graph.edges.sum())
    if not isinstance(n, int | np.integer) or not 0 <= n <= most:
        raise ValueError(expected("n", f"an int in [0, {most}]", n, "the graph has no more edges"))
    ordered = np.abs(scores_RW) if by == "absolute" else scores_RW
    return np.where(graph.edges, ordered, -np.inf)
