"""Steps on the way between two runs: run as one batch, and read backwards by every edge."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.residual_gradients import target_value
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.numerics import contract
from arrakis_jax.edges.graph import WRITTEN, Graph
from arrakis_jax.forward.targets import Target, read_target
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import walk
from arrakis_jax.patching.pairs import Pair
from arrakis_jax.stream.fields import READERS
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ResidualStream

# Each edge u -> r has a gate s, a number for each example, at s = 0. Its reader reads
#     x_r + sum_u s_ur change_u
# so that the edge's effect is the slope of the target with respect to its gate:
#     d target / d s_ur = sum over positions of change_u . g_r,  with g_r the gradient at x_r.
# The changes are known only after the forward, since its steps may be the runs that they are the
# difference of. So they come in backwards: a dummy `changes` is handed from reader to reader, and
# what the caller gives as its cotangent, the changes, passes every reader on the way back.


@jax.custom_vjp
def _read(x: Array, gate: Array, changes: Array) -> tuple[Array, Array]:
    """Identity forwards. Backwards it hands the cotangent of `changes` on unchanged.

    `gate` gets the inner product of each change with this reader's gradient.
    """
    return x, changes


def _read_forwards(x: Array, gate: Array, changes: Array) -> tuple[tuple[Array, Array], None]:
    return _read(x, gate, changes), None


def _read_backwards(_: None, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    x, changes_WBTD = cotangents
    # Steps are rows of one batch, and the changes are the same in all of them: sum them first.
    total = x.reshape(-1, changes_WBTD.shape[1], *x.shape[1:]).sum(0)
    gate = contract("BT...D,WBTD->...WB", total, changes_WBTD)
    return x, gate, changes_WBTD


_read.defvjp(_read_forwards, _read_backwards)


def _products_with_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """What is kept for the backward pass: products with weights, not attention's (T x T).

    A head's product with its own input is batched over heads, attention's over examples too.
    """
    return primitive is jax.lax.dot_general_p and len(params["dimension_numbers"][1][0]) < 2


class StepsRun(NamedTuple):
    """N steps after their forward, ready for the backward pass.

    Attributes:
        value: `[N,B]`, the target.
        streams: what was written in the captured steps, by the step's number.
        effects: from the writers' changes `[W,B,T,D]` to the effects `[R,W,B]`.
    """

    value: Float[Array, "N B"]
    streams: dict[int, ResidualStream]
    effects: Callable[[Array], Array]

    def end(self, i: int) -> tuple[Float[Array, " B"], ResidualStream]:
        """The target of step i, and what was written in it."""
        return self.value[i], self.streams[i]


@dataclass(frozen=True)
class Way:
    """The way from a base to a source run.

    Attributes:
        embed: the embeddings at its ends.
        moved: None along inputs; what is written at both ends along activations.
    """

    model: Transformer
    graph: Graph
    mask: Array | None
    target: Target
    embed: tuple[Float[Array, "B T D"], Float[Array, "B T D"]]
    moved: tuple[ResidualStream, ResidualStream] | None = None

    @classmethod
    def of(cls, model: Transformer, pair: Pair, target: Target) -> "Way":
        """The way between the runs of a pair."""
        assert pair.source is not None
        base, source = (
            model.embed(tokens, mask=pair.mask).astype(model.config.stream)
            for tokens in (pair.base, pair.source)
        )
        return cls(model, Graph.of(model.config), pair.mask, target, (base, source))

    def end(self, i: int) -> tuple[Float[Array, " B"], ResidualStream]:
        """The target of the base (0) or source run (1), and what is written in it."""
        return target_value(self.model, self.embed[i], self.mask, self.target, capture=WRITTEN)

    def group(self, layer: Any, mlp: bool) -> Any:
        """The number of a layer's heads or MLP among the groups of writers; the embedding is 0."""
        return 1 + layer * (1 + self.graph.has_mlp) + mlp

    def run(
        self, node_N: Any, weight_N: Any, captured: tuple[int, ...] = (), *, group: Any = 0
    ) -> StepsRun:
        """Runs N steps as one batch, and keeps the writes of the captured ones.

        Along activations only this group's outputs are moved.
        """
        acc = self.model.config.acc
        node_N, weight_N = (jnp.asarray(x, acc) for x in (node_N, weight_N))
        steps = _Steps.of(self, node_N, weight_N, captured, group)
        # A dummy of the changes' shape; the real ones come in as its cotangent.
        changes_WBTD = jnp.zeros((self.graph.n_writers, *self.embed[0].shape), acc)
        (total, _), pull, (value_NB, records) = jax.vjp(
            steps.forward, self._gates(), changes_WBTD, has_aux=True
        )

        def effects(changes_WBTD: Array) -> Float[Array, "R W B"]:
            return self._joined(pull((jnp.ones_like(total), changes_WBTD))[0])

        streams = {}
        for row, i in enumerate(captured):
            written = {name: value[:, row] for name, value in records.items()}
            streams[i] = ResidualStream(embed=steps.x_NBTD[i], **written)
        return StepsRun(value_NB, streams, effects)

    def changes_of_outputs(self) -> dict[str, Array]:
        """What moves along activations: each output of the source minus the base run."""
        if self.moved is None:
            return {}
        base, source = self.moved
        names = ("z", "mlp_out") if self.graph.has_mlp else ("z",)
        return {name: getattr(source, name) - getattr(base, name) for name in names}

    def _gates(self) -> dict[str, Array]:
        """A zero for each edge and example, by the reader's kind: what is differentiated."""
        graph, acc = self.graph, self.model.config.acc
        kinds = {
            "q_in": (graph.n_heads,),
            "k_in": (graph.n_kv_heads,),
            "v_in": (graph.n_kv_heads,),
            **({"mlp_in": ()} if graph.has_mlp else {}),
        }
        shape = (graph.n_writers, self.embed[0].shape[0])
        gates = {name: jnp.zeros((graph.n_layers, *n, *shape), acc) for name, n in kinds.items()}
        return gates | {"final": jnp.zeros(shape, acc)}

    def _joined(self, gates: dict[str, Array]) -> Float[Array, "R W B"]:
        """The gates' slopes in the order of the graph's readers, zero where there is no edge."""
        final_WB = gates["final"]
        inside = [
            gates[name].reshape(self.graph.n_layers, -1, *final_WB.shape)
            for name in READERS
            if name in gates
        ]
        inside_RWB = jnp.concatenate(inside, 1).reshape(-1, *final_WB.shape)
        effects_RWB = jnp.concatenate([inside_RWB, final_WB[None]])
        return jnp.where(self.graph.edges[..., None], effects_RWB, 0)


@dataclass(frozen=True)
class _Steps:
    """N steps of a way as one batch of N x B rows.

    Attributes:
        node_N: where on the way each step is, 0 at the base and 1 at the source run.
        weight_N: each step's weight in the mean.
        captured: the steps whose writes are kept.
        group: whose outputs are moved along activations.
        x_NBTD: the embedded stream of each step.
    """

    way: Way
    node_N: Array
    weight_N: Array
    captured: tuple[int, ...]
    group: Any
    x_NBTD: Float[Array, "N B T D"]
    padding: Padding
    contexts: AttentionContexts

    @classmethod
    def of(
        cls, way: Way, node_N: Array, weight_N: Array, captured: tuple[int, ...], group: Any
    ) -> "_Steps":
        """The steps at these nodes; along activations the embedding is a group of its own."""
        config, (base_BTD, source_BTD) = way.model.config, way.embed
        # Along inputs the group is always 0, the embedding.
        at = node_N[:, None, None, None] * (group == 0)
        x_NBTD = ((1 - at) * base_BTD[None] + at * source_BTD[None]).astype(config.stream)
        mask = None if way.mask is None else jnp.tile(way.mask, (len(node_N), 1))
        n_rows, length = base_BTD.shape[:2]
        padding = Padding.of((len(node_N) * n_rows, length), mask)
        contexts = AttentionContexts.of(config, padding)
        return cls(way, node_N, weight_N, captured, group, x_NBTD, padding, contexts)

    def forward(self, gates: dict[str, Array], changes: Array) -> tuple[tuple, tuple]:
        """The weighted sum of targets with `changes` handed through; each target, and records."""
        way = self.way
        inside = {name: gate for name, gate in gates.items() if name != "final"}
        layer = jax.checkpoint(self._layer, policy=_products_with_weights, prevent_cse=False)
        walked = walk(
            way.model,
            lambda carry, place, xs: layer(carry, place.block, place.index, *xs),
            (self.x_NBTD.reshape(-1, *self.x_NBTD.shape[2:]), changes),
            (inside, way.changes_of_outputs()),
        )
        x, changes = walked.state
        x, changes = _read(x, gates["final"], changes)
        # The target is checked for B rows, so the steps are an axis of their own again.
        value_NB = jax.vmap(lambda x_BTD: read_target(way.model, x_BTD, way.mask, way.target))(
            x.reshape(self.x_NBTD.shape)
        )
        return ((value_NB * self.weight_N[:, None]).sum(), changes), (value_NB, walked.found)

    def _layer(
        self,
        carry: tuple[Array, Array],
        block: Block,
        index: Array,
        gates: dict[str, Array],
        change: dict[str, Array],
    ) -> tuple[tuple[Array, Array], dict[str, Array]]:
        """One layer of all steps, whose readers read through their gates; and what it wrote."""
        x, changes = carry

        def read(name: str, value: Array) -> Array:
            nonlocal changes
            value, changes = _read(value, gates[name], changes)
            return value

        site = Sites(
            capture=frozenset(WRITTEN if self.captured else ()),
            taps={name: partial(read, name) for name in gates},
            edits=(partial(self._moved, index, change),),
            layer=index,
            mask=self.padding.mask,
        )
        x = block(x, self.contexts.at(index), index, site)
        records = {
            name: value.reshape(*self.x_NBTD.shape[:2], *value.shape[1:])[np.array(self.captured)]
            for name, value in site.records.items()
        }
        return (x, changes), records

    def _moved(
        self, index: Array, change: dict[str, Array], site: str, _: Any, value: Array
    ) -> Array:
        """An edit: an output moved to each step's place, if it is of the group that is moved."""
        if site not in change:
            return value
        is_moved = self.group == self.way.group(index, site == "mlp_out")
        step = jnp.multiply.outer(self.node_N * is_moved, change[site])
        return (value + step.reshape(value.shape)).astype(value.dtype)
