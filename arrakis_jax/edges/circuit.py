"""Circuits: the model with only some of its edges intact, and how faithful that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.residual_gradients import target_value
from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_choice, checked_numbers
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.edges.graph import Graph
from arrakis_jax.edges.select import greedy_edges, pruned, top_edges
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target, read_target
from arrakis_jax.frozen.writes import written
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Place, walk
from arrakis_jax.patching.pairs import Pair, checked_pair
from arrakis_jax.results.record import Record
from arrakis_jax.results.table import Table
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ResidualStream

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SELECT = {"top": top_edges, "greedy": greedy_edges}
# What a layer of a circuit reads from the corrupt run, where the model has it.
CORRUPT_FIELDS = ("resid_pre", "resid_mid", "z", "attn_out", "mlp_out", "norm_attn_out_scale")


def run_circuit(
    model: Transformer,
    clean: Tokens,
    corrupt: Tokens,
    target: Target | Callable | Ids,
    *,
    circuits: Bool[Array, "N R W"] | np.ndarray,
    mask: Mask | None = None,
    check: bool = False,
) -> Float[Array, "N B"]:
    """The target on the clean prompt with every edge outside of a circuit corrupted.

    Reader r reads its input of the corrupt run, plus `u's write in this run - u's write in the
    corrupt run` for each writer u whose edge to r is in the circuit. All edges give the clean run,
    no edges the corrupt run. Output biases, also behind a norm of the output, belong to no head:
    every reader reads them as they are in this run. The norm's scale is this run's too.

    Args:
        model: a transformer whose stream is a sum of what is written to it.
        clean: `[B,T]` token ids.
        corrupt: `[B,T]`, the other prompt of each pair, token for token.
        target: what is measured, such as `Logit(3, against=4)`; of the clean prompts.
        circuits: `[N,R,W]`, for each circuit which edges are in it, over the readers and writers of
            `Graph.of(model.config)`. Entries where the graph has no edge are not read.
        mask: `[B,T]`, of both prompts.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        `[N,B]`, in units of the target. Each circuit costs about one forward and an edge
        contraction; they are run one after another.

    Raises:
        TypeError, ValueError, IndexError: for pairs, targets or circuits that do not fit, and for a
            model with norms on the stream itself.

    Example:
        >>> model, tokenizer = demo_model()
        >>> clean = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> corrupt = encode(tokenizer, "Alice and Tom met, Alice gave a book to")
        >>> every = jnp.asarray(Graph.of(model.config).edges)[None]
        >>> run_circuit(model, clean, corrupt, Logit(3), circuits=every).shape
        (1, 1)
    """
    graph = Graph.of(model.config)
    pair = checked_pair(model, clean, corrupt, mask, check=check)
    target = checked_target(model, pair.base, target, pair.mask)
    shape, wanted = jnp.shape(circuits), graph.edges.shape
    if len(shape) != 3 or shape[1:] != wanted:
        do = "add an axis with circuits[None]" if shape == wanted else "see Graph.of(model.config)"
        raise ValueError(expected("circuits", f"[N, {wanted[0]}, {wanted[1]}]", f"{shape}", do))
    circuits = jnp.asarray(circuits)
    if circuits.dtype != bool:
        do = "say which edges are in it"
        raise TypeError(expected("circuits", "bool", f"dtype {circuits.dtype}", do))
    return _run_circuits(model, pair, target, circuits)[0]


@compiled()
def _run_circuits(
    model: Transformer, pair: Pair, target: Target, circuits: Bool[Array, "N R W"]
) -> tuple[Float[Array, "N B"], Float[Array, " B"], Float[Array, " B"]]:
    """The target in each circuit, in the clean and in the corrupt run."""
    config, mask = model.config, pair.mask
    graph, acc = Graph.of(config), config.acc
    padding = Padding.of(pair.base.shape, mask)
    assert pair.source is not None  # as checked
    contexts = AttentionContexts.of(config, padding)
    clean, corrupt = (model.embed(tokens, mask=mask) for tokens in (pair.base, pair.source))
    corrupt_B, other = target_value(model, corrupt, mask, target, capture=CORRUPT_FIELDS)
    clean_B, _ = target_value(model, clean, mask, target)
    corrupt_fields = {
        name: value for name in CORRUPT_FIELDS if (value := getattr(other, name)) is not None
    }

    def of_circuit(circuit_RW: Bool[Array, "R W"]) -> Float[Array, " B"]:
        # One more writer, that every reader reads: what belongs to no head.
        circuit_RW = jnp.pad(circuit_RW, ((0, 0), (0, 1)), constant_values=True).astype(acc)
        inside_LnW = circuit_RW[:-1].reshape(graph.n_layers, graph.readers_per_layer, -1)
        changes_WBTD = jnp.zeros((graph.n_writers + 1, *clean.shape), acc)
        changes_WBTD = changes_WBTD.at[0].set((clean - corrupt).astype(acc))

        def step(changes_WBTD: Array, place: Place, xs: tuple) -> tuple[Array, None]:
            edges_nW, corrupt_fields = xs
            stream = ResidualStream(**corrupt_fields, mask=padding.real)
            layer = _Layer(graph, place.block, place.index, padding, stream)
            return layer.changes(changes_WBTD, edges_nW, contexts.at(place.index)), None

        changes_WBTD = walk(model, step, changes_WBTD, (inside_LnW, corrupt_fields)).state
        read = contract("W,WBTD->BTD", circuit_RW[-1], changes_WBTD)
        return read_target(model, other.final + read, mask, target)

    # One circuit at a time: each holds what all writers change, `[W,B,T,D]`.
    return jax.lax.map(of_circuit, circuits), clean_B, corrupt_B


@dataclass(frozen=True)
class _Layer:
    """One layer of a run in which every reader has an input of its own.

    Attributes:
        other: the corrupt run in this layer.
    """

    graph: Graph
    block: Block
    index: Int[Array, ""]
    padding: Padding
    other: ResidualStream

    def changes(
        self, changes_WBTD: Array, edges_nW: Array, context: Any
    ) -> Float[Array, "W B T D"]:
        """The writes so far minus the corrupt run's, with those of this layer filled in.

        The last entry is what belongs to no writer.
        """
        graph, block, other = self.graph, self.block, self.other
        h, g = graph.n_heads, graph.n_kv_heads
        q_nW, k_nW, v_nW, rest_nW = jnp.split(edges_nW, [h, h + g, h + 2 * g])
        capture = frozenset(("z", "norm_attn_out_scale"))
        site = Sites(capture=capture, mask=self.padding.mask, layer=self.index)
        first = 1 + self.index * graph.writers_per_layer
        before = changes_WBTD  # later writers are still zero, whatever the circuit says of them

        def read(edges_nW: Array) -> Float[Array, "B T n D"]:
            change = contract("nW,WBTD->BTnD", edges_nW, before)
            return block.read("attn", other.resid_pre[..., None, :] + change, site)

        # Every query, key and value head has an input of its own.
        inputs = (read(q_nW), read(k_nW), read(v_nW))
        attn_BTD = block.attn_write(inputs, context, self.index, site) - other.attn_out
        fields: dict[str, Any] = {**site.records, "mask": self.padding.real}
        heads_HBTD = self._heads(ResidualStream(**fields))
        # What attention writes beyond its heads: the output bias.
        rest_BTD = attn_BTD - heads_HBTD.sum(0)
        changes_WBTD = jax.lax.dynamic_update_slice_in_dim(changes_WBTD, heads_HBTD, first, 0)
        changes_WBTD = changes_WBTD.at[-1].add(rest_BTD)
        if not graph.has_mlp:
            return changes_WBTD
        # In a parallel block the MLP does not read the heads of its own layer.
        seen, x_BTD = (
            (before, other.resid_pre) if graph.parallel else (changes_WBTD, other.resid_mid)
        )
        x_BTD = x_BTD + contract("W,WBTD->BTD", rest_nW[0], seen)
        y_BTD = block.read("attn" if block.config.shared_norm else "mlp", x_BTD, site)
        mlp_BTD = block.mlp_write(y_BTD, site) - other.mlp_out
        return jax.lax.dynamic_update_index_in_dim(changes_WBTD, mlp_BTD, first + h, 0)

    def _heads(self, this: ResidualStream) -> Float[Array, "H B T D"]:
        """The heads' writes minus the corrupt run's, each through a norm with its run's scale."""
        config, norm = self.block.config, self.block.norm_attn_out
        through, share_BT = written(config, this, norm, "attn")
        _, other_BT = written(config, self.other, norm, "attn")
        z_BTHK = this.z * share_BT[..., None, None] - self.other.z * other_BT[..., None, None]
        return contract("BTHK,HKD->HBTD", z_BTHK, through(self.block.attn.w_o[...]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class CircuitFaithfulness(Record):
    """How much of the difference between the clean and the corrupt run circuits recover.

    `f(C) = (m(C) - m(none)) / (m(all) - m(none))`, with m the target. It is 0 for the corrupt run
    and 1 for the clean run, and may lie outside of [0, 1].

    Attributes:
        target: `[N,B]`, of each circuit.
        clean: `[B]`, with all edges.
        corrupt: `[B]`, with none.
        circuits: `[N,R,W]` bool, which edges are in them.
        graph: the readers and writers.
        fractions: how many edges were chosen, as a share of all.
    """

    target: Float[Array, "N B"]
    clean: Float[Array, " B"]
    corrupt: Float[Array, " B"]
    circuits: Bool[Array, "N R W"]
    graph: Graph = field(metadata={"static": True})
    fractions: tuple[float, ...] = field(metadata={"static": True})

    @property
    def n_edges(self) -> Int[Array, " N"]:
        """How many edges each circuit has, without those that lead nowhere."""
        return self.circuits.sum((1, 2))

    @property
    def faithfulness(self) -> Float[Array, "N B"]:
        """`f` of each example; not finite where the clean and the corrupt target are equal."""
        return (self.target - self.corrupt[None]) / (self.clean - self.corrupt)[None]

    @property
    def of_means(self) -> Float[Array, " N"]:
        """`f` of the target's means over the batch, as in MIB."""
        least = self.corrupt.mean()
        return (self.target.mean(-1) - least) / (self.clean.mean() - least)

    @property
    def cpr(self) -> Float[Array, ""]:
        """The integral of `of_means` over the fraction (circuit performance ratio)."""
        return self._area(self.of_means)

    @property
    def cmd(self) -> Float[Array, ""]:
        """The integral of `|1 - of_means|` (circuit-model distance)."""
        return self._area(jnp.abs(1 - self.of_means))

    def _area(self, values: Array) -> Float[Array, ""]:
        """By trapezoids, from the first fraction to the last."""
        return jnp.trapezoid(values, jnp.asarray(self.fractions, values.dtype))

    def to_table(self) -> Table:
        """A row for each circuit, of the batch. Columns: fraction, edges, target, faithfulness."""
        return Table(
            fraction=list(self.fractions),
            edges=np.asarray(self.n_edges).tolist(),
            target=np.asarray(self.target.mean(-1)).tolist(),
            faithfulness=np.asarray(self.of_means).tolist(),
        )


def circuit_faithfulness(
    model: Transformer,
    clean: Tokens,
    corrupt: Tokens,
    target: Target | Callable | Ids,
    *,
    scores: Float[Array, "R W"] | np.ndarray,
    fractions: tuple[float, ...] = FRACTIONS,
    select: str = "top",
    by: str = "absolute",
    base: str = "clean",
    mask: Mask | None = None,
    check: bool = False,
) -> CircuitFaithfulness:
    """How faithful circuits of the highest scored edges are, for growing numbers of edges.

    Args:
        model: a transformer whose stream is a sum of what is written to it.
        clean: `[B,T]` token ids.
        corrupt: `[B,T]`, the other prompt of each pair, token for token.
        target: what is measured, such as `Logit(3, against=4)`; of the clean prompts.
        scores: `[R,W]`, such as `edge_attribution(...).effects.mean(-1)`.
        fractions: how many edges to choose, as shares of all, ascending in (0, 1].
        select: "top", the largest; or "greedy", the largest that are connected to the output.
            Edges on no path from the embedding to the output are then removed.
        by: the order: "absolute" values, or "signed": first the edges that favour the clean run.
        base: the run that was patched to get the scores, "clean" or "corrupt". A patch of the
            clean run takes an edge away, so edges that favour the clean run have negative scores.
        mask: `[B,T]`, of both prompts.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        CircuitFaithfulness; `cpr` and `cmd` are its areas over the fractions.

    Raises:
        TypeError, ValueError, IndexError: for pairs, targets, scores or options that do not fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> clean = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> corrupt = encode(tokenizer, "Alice and Tom met, Alice gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> pair = (model, clean, corrupt, Logit(alice, tom))
        >>> scores = edge_attribution(*pair, steps=5).effects.mean(-1)
        >>> curve = circuit_faithfulness(*pair, scores=scores, fractions=(0.1, 1.0))
        >>> float(curve.of_means[1].round(3))
        1.0

    Reference:
        Mueller et al. 2025 (MIB); Hanna et al. 2024.
    """
    graph = Graph.of(model.config)
    checked_choice("select", select, tuple(SELECT))
    checked_choice("base", base, ("clean", "corrupt"))
    fractions = tuple(np.atleast_1d(np.asarray(fractions, float)).tolist())
    ends = (0.0, *fractions, 1.0)
    if not fractions or not (np.diff(ends)[:-1] > 0).all() or fractions[-1] > 1:
        do = "such as (0.01, 0.1, 1)"
        raise ValueError(expected("fractions", "ascending in (0, 1]", fractions, do))
    do = "such as edge_attribution(...).effects.mean(-1)"
    # Signed scores rank edges by what they add to the clean target, which patches take away.
    sign = -1 if by == "signed" and base == "clean" else 1
    scores = sign * np.asarray(checked_numbers("scores", scores, do))
    n_edges = int(graph.edges.sum())
    choose = SELECT[select]
    circuits = [pruned(choose(scores, round(k * n_edges), graph, by=by), graph) for k in fractions]
    circuits = jnp.asarray(np.stack(circuits))
    pair = checked_pair(model, clean, corrupt, mask, check=check)
    target = checked_target(model, pair.base, target, pair.mask)
    target_NB, clean_B, corrupt_B = _run_circuits(model, pair, target, circuits)
    return CircuitFaithfulness(
        target=target_NB,
        clean=clean_B,
        corrupt=corrupt_B,
        circuits=circuits,
        graph=graph,
        fractions=fractions,
    )
