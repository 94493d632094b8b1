"""The effect of every edge to first order, at the base run (EAP) or along a path (EAP-IG)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.integrated_gradients import RULES, rule_nodes
from arrakis_jax.attribution.residual_gradients import target_value
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_choice, checked_count
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.edges.effects import EdgeEffects
from arrakis_jax.edges.graph import WRITTEN, Graph, writer_changes
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target, read_target
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import walk
from arrakis_jax.patching.pairs import Pair, checked_pair
from arrakis_jax.stream.fields import READERS
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ResidualStream


def edge_attribution(
    model: Transformer,
    clean: Tokens,
    corrupt: Tokens,
    target: Target | Callable | Ids,
    *,
    base: str = "clean",
    steps: int | None = None,
    along: str = "inputs",
    rule: str = "right",
    step_batch: int | None = None,
    mask: Mask | None = None,
    check: bool = False,
) -> EdgeEffects:
    """The effect of patching each edge of the model's graph, to first order.

    For the edge from writer u to reader r, the sum over positions of `(u's write in the source run
    - in the base run) . g_r`, with `g_r` the gradient of the target with respect to what r reads,
    before its norm: that of the base run (EAP), or with `steps` a mean of gradients on the way from
    the base to the source run (EAP-IG). A write is what a writer adds to the stream, a head's
    through a norm of the output to first order. EAP's sum over the readers of a writer is the
    writer's own effect to first order (attribution patching of `z`, `mlp_out` or `embed`). The
    choice of experts is held fixed, their weights are not.

    In forwards, besides the products of writes with gradients (once for each batch of steps), EAP
    costs 3; EAP-IG along inputs 2 + 2m, or 1 + 2m by a rule that holds an end of the way, and along
    activations 2 + 2m (2L + 1).

    Args:
        model: a transformer whose stream is a sum of what is written to it.
        clean: `[B,T]` token ids.
        corrupt: `[B,T]`, the other prompt of each pair, token for token.
        target: what is explained, such as `Logit(3, against=4)`; positions, ids and continuations
            are of the base run.
        base: the run that is patched, "clean" (with the corrupt run's writes) or "corrupt".
        steps: m, how many gradients EAP-IG takes the mean of; None for EAP.
        along: "inputs": the embedding is moved from the base to the source run, and all else
            follows. "activations": for each group of writers (the embedding, the heads of a layer,
            an MLP) only the group's own outputs are moved, for the effects of these writers.
        rule: where on the way, 0 at the base and 1 at the source run (in models with RMSNorm and
            RoPE the mean converges slowly, and "midpoint" the soonest): "right", the published one,
            1/m, ..., 1; "left" 0, ..., (m-1)/m; "midpoint"; "gauss_legendre"; or "trapezoid", with
            one more.
        step_batch: how many steps are run at once at most, for which memory is needed; None for
            all of them.
        mask: `[B,T]`, of both prompts.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        EdgeEffects in units of the target.

    Raises:
        TypeError, ValueError, IndexError: for pairs, targets or options that do not fit, and for a
            model with norms on the stream itself.

    Example:
        >>> model, tokenizer = demo_model()
        >>> clean, mask = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> corrupt, _ = encode(tokenizer, "Alice and Tom met, Alice gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> found = edge_attribution(model, clean, corrupt, Logit(alice, tom), steps=5, mask=mask)
        >>> found.effects.shape == (found.graph.n_readers, found.graph.n_writers, 1)
        True

    Reference:
        Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG).
    """
    pair = checked_pair(model, clean, corrupt, mask, base=base, check=check)
    Graph.of(model.config)
    target = checked_target(model, pair.base, target, pair.mask)
    checked_choice("along", along, ("inputs", "activations"))
    checked_choice("rule", rule, RULES)
    if steps is None:
        for name, value, default in (("along", along, "inputs"), ("step_batch", step_batch, None)):
            if value != default:
                do = "give `steps` too, or leave it out"
                raise ValueError(expected(name, f"{default!r} with steps=None", repr(value), do))
    for name, value in (("steps", steps), ("step_batch", step_batch)):
        if value is not None:
            checked_count(name, value, 10**4)
    return _edge_attribution(
        model, pair, target, steps=steps, along=along, rule=rule, step_batch=step_batch
    )


@compiled("steps", "along", "rule", "step_batch")
def _edge_attribution(model, pair, target, *, steps, along, rule, step_batch):
    node_N, weight_N = (np.zeros(1), np.ones(1)) if steps is None else rule_nodes(rule, steps)
    size = min(step_batch or node_N.size, node_N.size)
    at_once = along == "inputs" and size == node_N.size
    way = _Way.of(model, pair, target)
    # An end of the way that is one of the steps needs no run of its own.
    among = {int(a): i for i, a in enumerate(node_N) if a in (0, 1)} if at_once else {}
    run = way.run(node_N, weight_N, tuple(among.values())) if at_once else None
    ends = [way.end(i) if run is None or i not in among else run.end(among[i]) for i in range(2)]
    (base_B, base), (source_B, source) = ends
    changes_WBTD = writer_changes(model, base, source, linear=True)
    if run is not None:
        effects_RWB = run.effects(changes_WBTD)
    else:
        way = replace(way, moved=(base, source) if along == "activations" else None)
        effects_RWB = _over_steps(way, changes_WBTD, node_N, weight_N, size)
    method = "EAP" if steps is None else f"EAP-IG along {along} ({rule}, {steps} steps)"
    return EdgeEffects(
        effects=effects_RWB, base=base_B, source=source_B, graph=way.graph, method=method
    )


def _over_steps(
    way: "_Way", changes_WBTD: Array, node_N: np.ndarray, weight_N: np.ndarray, size: int
) -> Float[Array, "R W B"]:
    """The effects, some steps at a time; along activations of a group of writers after another."""
    graph = way.graph
    short = -node_N.size % size
    node_N, weight_N = np.pad(node_N, (0, short), mode="edge"), np.pad(weight_N, (0, short))
    chunks = [x.reshape(-1, size) for x in (node_N, weight_N)]
    group_W = np.array(
        [
            0 if node.layer is None else way.group(node.layer, node.kind == "mlp")
            for node in graph.writers
        ]
    )
    groups = np.unique(group_W) if way.moved is not None else np.zeros(1, int)
    if way.moved is None:
        group_W = np.zeros_like(group_W)

    def add(total_RWB: Array, xs: tuple) -> tuple[Array, None]:
        group, node_N, weight_N = xs
        found_RWB = way.run(node_N, weight_N, group=group).effects(changes_WBTD)
        own_W = jnp.asarray(group_W) == group
        return total_RWB + jnp.where(own_W[None, :, None], found_RWB, 0), None

    zero = jnp.zeros((graph.n_readers, *changes_WBTD.shape[:2]), changes_WBTD.dtype)
    xs = (
        np.repeat(groups, len(chunks[0])),
        *(jnp.asarray(np.tile(x, (groups.size, 1)), zero.dtype) for x in chunks),
    )
    return jax.lax.scan(add, zero, xs)[0]


class _Run(NamedTuple):
    """N steps that were run, and what is to be run backwards.

    Attributes:
        value: `[N,B]`, the target.
        streams: what was written in some of the steps.
        effects: from the writers' changes `[W,B,T,D]` to the effects `[R,W,B]`.
    """

    value: Float[Array, "N B"]
    streams: dict[int, ResidualStream]
    effects: Callable

    def end(self, i: int) -> tuple[Float[Array, " B"], ResidualStream]:
        """The target of step i, and what was written in it."""
        return self.value[i], self.streams[i]


@dataclass(frozen=True)
class _Way:
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
    def of(cls, model: Transformer, pair: Pair, target: Target) -> "_Way":
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
    ) -> _Run:
        """Runs N steps as one batch, with the writes of some of them captured.

        Along activations only this group's outputs are moved.
        """
        config, graph = self.model.config, self.graph
        n_rows, n_steps = self.embed[0].shape[0], len(node_N)
        node_N, weight_N = (jnp.asarray(x, config.acc) for x in (node_N, weight_N))
        mask = None if self.mask is None else jnp.tile(self.mask, (n_steps, 1))
        at = node_N[:, None, None, None] * (group == 0)
        x_NBTD = (1 - at) * self.embed[0][None] + at * self.embed[1][None]
        x_NBTD = x_NBTD.astype(config.stream)
        padding = Padding.of((n_steps * n_rows, x_NBTD.shape[2]), mask)
        contexts = AttentionContexts.of(config, padding)
        capture = frozenset(WRITTEN if captured else ())

        def moving(layer: Array, change: dict[str, Array]) -> Callable:
            """An edit that moves the group's outputs, if they are of this layer."""

            def moved(site: str, _: Any, value: Array) -> Array:
                if site not in change:
                    return value
                here = group == self.group(layer, site == "mlp_out")
                step = jnp.multiply.outer(node_N * here, change[site])
                return (value + step.reshape(value.shape)).astype(value.dtype)

            return moved

        def layer(
            carry: tuple[Array, Array], block: Block, index: Array, xs: tuple
        ) -> tuple[tuple, dict[str, Array]]:
            (x, changes), (gates, change) = carry, xs

            def reading(name: str) -> Callable:
                def tap(value: Array) -> Array:
                    nonlocal changes
                    value, changes = _read(value, gates[name], changes)
                    return value

                return tap

            site = Sites(
                capture=capture,
                taps={name: reading(name) for name in gates},
                edits=(moving(index, change),),
                layer=index,
                mask=padding.mask,
            )
            x = block(x, contexts.at(index), index, site)
            records = {
                name: value.reshape(n_steps, n_rows, *value.shape[1:])[np.array(captured)]
                for name, value in site.records.items()
            }
            return (x, changes), records

        body = jax.checkpoint(layer, policy=_products_with_weights, prevent_cse=False)
        change = {}
        if self.moved is not None:
            base, source = self.moved
            change["z"] = source.z - base.z
            if graph.has_mlp:
                change["mlp_out"] = source.mlp_out - base.mlp_out

        def forward(gates: dict[str, Array], changes: Array) -> tuple[tuple, tuple]:
            inside = {name: gate for name, gate in gates.items() if name != "final"}
            carry = (x_NBTD.reshape(-1, *x_NBTD.shape[2:]), changes)
            walked = walk(
                self.model,
                lambda carry, place, xs: body(carry, place.block, place.index, xs),
                carry,
                (inside, change),
            )
            x, changes = walked.state
            x, changes = _read(x, gates["final"], changes)
            value_NB = jax.vmap(lambda x: read_target(self.model, x, self.mask, self.target))(
                x.reshape(x_NBTD.shape)
            )
            return ((value_NB * weight_N[:, None]).sum(), changes), (value_NB, walked.found)

        shape = (graph.n_writers, *self.embed[0].shape)
        zeros = (self._gates(n_rows), jnp.zeros(shape, config.acc))
        (total, _), pull, (value_NB, records) = jax.vjp(forward, *zeros, has_aux=True)

        def effects(changes_WBTD: Array) -> Float[Array, "R W B"]:
            return self._joined(pull((jnp.ones_like(total), changes_WBTD))[0])

        streams = {
            i: ResidualStream(
                embed=x_NBTD[i], **{name: value[:, j] for name, value in records.items()}
            )
            for j, i in enumerate(captured)
        }
        return _Run(value_NB, streams, effects)

    def _gates(self, n_rows: int) -> dict[str, Array]:
        """A number for each edge and example, by kind of reader: what the gradient is taken of."""
        graph, acc = self.graph, self.model.config.acc
        kinds = {
            "q_in": (graph.n_heads,),
            "k_in": (graph.n_kv_heads,),
            "v_in": (graph.n_kv_heads,),
            **({"mlp_in": ()} if graph.has_mlp else {}),
        }
        shape = (graph.n_writers, n_rows)
        gates = {name: jnp.zeros((graph.n_layers, *n, *shape), acc) for name, n in kinds.items()}
        return gates | {"final": jnp.zeros(shape, acc)}

    def _joined(self, gates: dict[str, Array]) -> Float[Array, "R W B"]:
        """These numbers in the order of the graph's readers, zero where there is no edge."""
        final_WB = gates["final"]
        inside = [
            gates[name].reshape(self.graph.n_layers, -1, *final_WB.shape)
            for name in READERS
            if name in gates
        ]
        inside_RWB = jnp.concatenate(inside, 1).reshape(-1, *final_WB.shape)
        effects_RWB = jnp.concatenate([inside_RWB, final_WB[None]])
        return jnp.where(self.graph.edges[..., None], effects_RWB, 0)


@jax.custom_vjp
def _read(x: Array, gate: Array, changes: Array) -> tuple[Array, Array]:
    """A reader's input, of which the gate is to scale the changes of all writers.

    Neither does anything forwards. What the writers change is known only after the forward, and
    comes in backwards: it is the cotangent of `changes`, which is handed from reader to reader.
    """
    return x, changes


def _read_forwards(x: Array, gate: Array, changes: Array) -> tuple[tuple[Array, Array], None]:
    return _read(x, gate, changes), None


def _read_backwards(_: None, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    x, changes_WBTD = cotangents
    total = x.reshape(-1, changes_WBTD.shape[1], *x.shape[1:]).sum(0)  # over the steps
    gate = contract("BT...D,WBTD->...WB", total, changes_WBTD)
    return x, gate, changes_WBTD


_read.defvjp(_read_forwards, _read_backwards)


def _products_with_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """What is kept for the backward pass: not the products of attention, T x T, but all others.

    A head's product with its own input is batched over heads, attention's over examples too.
    """
    return primitive is jax.lax.dot_general_p and len(params["dimension_numbers"][1][0]) < 2
