"""The residual stream as a graph: its writers, its readers, and what each writer changes.

Every head and MLP reads the sum of all earlier writes. So a model is a graph: edges go from each
writer (the embedding, heads, MLPs) to each later reader (the queries, keys and values of heads,
MLPs, the final norm). Scores of edges are arrays `[R,W,...]` over readers and writers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, over
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Place, walk
from arrakis_jax.stream.residuals import ResidualStream

# What a run must capture for `writer_changes`.
WRITTEN = ("embed", "z", "mlp_out")


class Node(NamedTuple):
    """A writer ("embed", "head", "mlp") or a reader ("q", "k", "v", "mlp", "final").

    Attributes:
        layer: its layer; None for embed and final.
        kind: what it is.
        head: which head (key/value head for "k" and "v"); None for the others.
    """

    layer: int | None
    kind: str
    head: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"L{self.layer} "
        return f"{layer}{self.kind}" + ("" if self.head is None else f" {self.head}")


class Edge(NamedTuple):
    """What a writer adds to the input of a reader."""

    writer: Node
    reader: Node

    def __str__(self) -> str:
        return f"{self.writer} -> {self.reader}"


@dataclass(frozen=True)
class Graph:
    """Writers and readers of a model, in the order in which they come, and the edges there are.

    Writers: the embedding (learned positions included), then in each layer its H heads and its MLP.
    Readers: in each layer H queries, G keys, G values and the MLP; then the final norm.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    has_mlp: bool
    parallel: bool

    @classmethod
    def of(cls, config: ModelConfig) -> "Graph":
        """The graph of a model; ValueError if its stream is no sum of what is written.

        Raises:
            ValueError: norms on the stream itself.
        """
        if config.norms_stream:
            do = "patch nodes instead"
            got = f"norm_placement={config.norm_placement!r}"
            raise ValueError(expected("model", "one whose stream is a sum of writes", got, do))
        return cls(
            config.n_layers, config.n_heads, config.n_kv_heads, config.any_mlp, config.parallel
        )

    @property
    def writers_per_layer(self) -> int:
        """H heads and the MLP."""
        return self.n_heads + self.has_mlp

    @property
    def readers_per_layer(self) -> int:
        """H queries, G keys, G values and the MLP."""
        return self.n_heads + 2 * self.n_kv_heads + self.has_mlp

    @property
    def n_writers(self) -> int:
        """W."""
        return 1 + self.n_layers * self.writers_per_layer

    @property
    def n_readers(self) -> int:
        """R."""
        return self.n_layers * self.readers_per_layer + 1

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        """The W writers."""
        nodes = [Node(None, "embed")]
        for layer in range(self.n_layers):
            nodes += [Node(layer, "head", h) for h in range(self.n_heads)]
            nodes += [Node(layer, "mlp")] * self.has_mlp
        return tuple(nodes)

    @cached_property
    def readers(self) -> tuple[Node, ...]:
        """The R readers."""
        heads = (("q", self.n_heads), ("k", self.n_kv_heads), ("v", self.n_kv_heads))
        nodes: list[Node] = []
        for layer in range(self.n_layers):
            nodes += [Node(layer, kind, h) for kind, n in heads for h in range(n)]
            nodes += [Node(layer, "mlp")] * self.has_mlp
        return (*nodes, Node(None, "final"))

    @cached_property
    def edges(self) -> np.ndarray:
        """`[R,W]` bool: whether the writer comes before the reader."""
        last_heads = not self.parallel  # the MLP also reads the heads of its own layer
        edges_RW = np.zeros((self.n_readers, self.n_writers), bool)
        for r, reader in enumerate(self.readers):
            layer = self.n_layers if reader.layer is None else reader.layer
            before = 1 + layer * self.writers_per_layer
            edges_RW[r, : before + (reader.kind == "mlp" and last_heads) * self.n_heads] = True
        return edges_RW

    def index(self, node: Any, side: str) -> int:
        """Where a node stands among the "writers" or "readers".

        Raises:
            ValueError: a node that is not there.
        """
        nodes = self.writers if side == "writers" else self.readers
        wanted = Node(*node)
        if wanted not in nodes:
            do = f"they are {nodes[0]}, {nodes[1]}, ..., {nodes[-1]}"
            raise ValueError(expected(side[:-1], f"one of the model's {side}", str(wanted), do))
        return nodes.index(wanted)


def writer_changes(
    model: Transformer, base: ResidualStream, source: ResidualStream, *, linear: bool
) -> Float[Array, "W B T D"]:
    """What each writer changes in the stream if its output becomes the source run's.

    A head's output is z. Where attention writes through a norm, a head's change is what leaves the
    norm if that head alone changes, or with `linear` its first order. The streams hold `WRITTEN`.
    """
    graph, acc = Graph.of(model.config), model.config.acc

    def of_heads(_: None, place: Place, z: tuple[Array, Array]) -> tuple[None, Array]:
        return None, head_changes(place.block, *z, linear=linear)

    # N writers of each layer, in the graph's order: heads, then the MLP.
    changes_LNBTD = walk(model, of_heads, None, (base.z, source.z)).found
    if graph.has_mlp:
        mlp_LBTD = (source.mlp_out - base.mlp_out).astype(acc)
        changes_LNBTD = jnp.concatenate([changes_LNBTD, mlp_LBTD[:, None]], 1)
    embed_BTD = (source.embed - base.embed).astype(acc)
    return jnp.concatenate([embed_BTD[None], changes_LNBTD.reshape(-1, *embed_BTD.shape)])


def head_changes(
    block: Block, z_BTHK: Array, source_BTHK: Array, *, linear: bool
) -> Float[Array, "H B T D"]:
    """What each head of a layer changes in the stream if its z becomes the source's."""
    config, norm = block.config, block.norm_attn_out
    w_o = block.attn.w_o[...]
    change_HBTD = contract("BTHK,HKD->HBTD", source_BTHK - z_BTHK, w_o)
    # A norm of the output sees all heads together: one head's change moves its scale for all.
    if norm is not None:
        out_BTD = contract("BTHK,HKD->BTD", z_BTHK, w_o)
        if block.attn.b_o is not None:
            out_BTD = out_BTD + over(block.attn.b_o[...].astype(out_BTD.dtype), out_BTD)

        def written(x_BTD: Array) -> Array:
            # Rows of zeros, as at padding, have no slope under the root.
            site = Sites(mask=jnp.any(x_BTD != 0, -1))
            return norm(x_BTD, site, "norm_attn_out_scale")

        def changed(change_BTD: Array) -> Array:
            if linear:
                return jax.jvp(written, (out_BTD,), (change_BTD,))[1]
            return written(out_BTD + change_BTD) - written(out_BTD)

        change_HBTD = jax.vmap(changed)(change_HBTD)
    return change_HBTD * config.residual_scale
