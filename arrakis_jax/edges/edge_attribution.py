"""The effect of every edge to first order, at the base run (EAP) or along a path (EAP-IG)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.integrated_gradients import QUADRATURE_RULES, rule_nodes
from arrakis_jax.attribution.method import refuse_beside
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_choice, checked_count
from arrakis_jax.core.errors import expected
from arrakis_jax.edges.effects import EdgeEffects
from arrakis_jax.edges.graph import Graph, writer_changes
from arrakis_jax.edges.steps import Way
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.patching.pairs import Pair, checked_pair


@dataclass(frozen=True, kw_only=True)
class EAP:
    """Edge attribution patching: the gradients of the base run, for `edge_attribution(method=...)`.

    Reference:
        Syed et al. 2023.
    """

    along: ClassVar[str] = "inputs"
    step_batch: ClassVar[None] = None  # the one step is one batch

    def __str__(self) -> str:
        return "EAP"

    def rule_nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """One step, at the base run."""
        return np.zeros(1), np.ones(1)


@dataclass(frozen=True, kw_only=True)
class EAPIG:
    """EAP with integrated gradients: a mean on the way, for `edge_attribution(method=...)`.

    Attributes:
        steps: how many gradients it takes the mean of.
        along: what is moved: "inputs", or "activations" of one group of writers at a time.
        rule: where on the way: "right", "left", "midpoint", "gauss_legendre" or "trapezoid".
        step_batch: how many steps are run at once at most; None for all of them.

    Reference:
        Hanna et al. 2024.
    """

    steps: int
    along: str = "inputs"
    rule: str = "right"
    step_batch: int | None = None

    def __post_init__(self) -> None:
        _check_way(self.along, self.rule)
        checked_count("steps", self.steps, 10**4)
        if self.step_batch is not None:
            checked_count("step_batch", self.step_batch, 10**4)

    def __str__(self) -> str:
        return f"EAP-IG along {self.along} ({self.rule}, {self.steps} steps)"

    def rule_nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the steps are on the way, and their weights."""
        return rule_nodes(self.rule, self.steps)


def edge_attribution(
    model: Transformer,
    clean: Tokens,
    corrupt: Tokens,
    target: Target | Callable | Ids,
    *,
    method: EAP | EAPIG | None = None,
    base: str = "clean",
    steps: int | None = None,
    along: str = "inputs",
    rule: str = "right",
    step_batch: int | None = None,
    mask: Mask | None = None,
    check: bool = False,
) -> EdgeEffects:
    """The effect of patching each edge of the model's graph, to first order.

    The effect of the edge from writer u to reader r is the sum over positions of `(u's write in the
    source run - in the base run) . g_r`. `g_r` is the gradient of the target with respect to what r
    reads, before its norm: the base run's gradient (EAP), or with `steps` a mean of gradients on
    the way from the base to the source run (EAP-IG). A write is what a writer adds to the stream;
    a norm of the output is taken to first order. EAP's effects of one writer sum, over its readers,
    to the writer's own effect to first order (attribution patching of `z`, `mlp_out` or `embed`).
    The choice of experts is held fixed, their weights are not.

    EAP costs 3 forwards. EAP-IG costs 2 + 2m along inputs (1 + 2m by a rule that holds an end of
    the way) and 2 + 2m (2L + 1) along activations. Each batch of steps adds one product of writes
    with gradients.

    Args:
        model: a transformer whose stream is a sum of what is written to it.
        clean: `[B,T]` token ids.
        corrupt: `[B,T]`, the other prompt of each pair, token for token.
        target: what is explained, such as `Logit(3, against=4)`; positions, ids and continuations
            are of the base run.
        method: `EAP()`, or an `EAPIG(steps=5)`, which holds all options itself; None to choose by
            `steps`.
        base: the run that is patched, "clean" (with the corrupt run's writes) or "corrupt".
        steps: m, how many gradients EAP-IG takes the mean of; None for EAP.
        along: "inputs": the embedding is moved from the base to the source run, and all else
            follows. "activations": for each group of writers (the embedding, the heads of a layer,
            an MLP) only the group's own outputs are moved, for the effects of these writers.
        rule: where on the way, 0 at the base and 1 at the source run: "right" 1/m, ..., 1; "left"
            0, ..., (m-1)/m; "midpoint"; "gauss_legendre"; or "trapezoid", with one more. The
            published loop is "right" along inputs. Along activations it is "left", and there it
            adds the gradients of every group's steps to every edge; here a group's steps count for
            its own writers alone. In models with RMSNorm and RoPE the mean converges slowly;
            "midpoint" is best.
        step_batch: how many steps are run at once at most, which bounds memory; None for all.
        mask: `[B,T]`, of both prompts.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        EdgeEffects in units of the target.

    Raises:
        TypeError, ValueError, IndexError: for pairs, targets or options that do not fit, and for a
            model with norms on the stream itself.

    Example:
        >>> model, tokenizer = demo_model()
        >>> clean = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> corrupt = encode(tokenizer, "Alice and Tom met, Alice gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> pair = (model, clean, corrupt, Logit(alice, tom))
        >>> edges = edge_attribution(*pair, method=EAPIG(steps=5))
        >>> edges.effects.shape == (edges.graph.n_readers, edges.graph.n_writers, 1)
        True

    Reference:
        Syed et al. 2023 (EAP); Hanna et al. 2024 (EAP-IG).
    """
    pair = checked_pair(model, clean, corrupt, mask, base=base, check=check)
    Graph.of(model.config)
    target = checked_target(model, pair.base, target, pair.mask)
    method = _checked_method(method, steps=steps, along=along, rule=rule, step_batch=step_batch)
    return _edge_attribution(model, pair, target, method=method)


def _checked_method(method: Any, **options: Any) -> EAP | EAPIG:
    """The method, or the one that the keywords describe.

    Raises:
        TypeError, ValueError: for another method, and for options that do not fit.
    """
    defaults = {"steps": None, "along": "inputs", "rule": "right", "step_batch": None}
    keywords = {name: x for name, x in options.items() if x is not None and x != defaults[name]}
    # Keywords at their defaults cannot be told from those left out.
    if isinstance(method, EAP | EAPIG):
        refuse_beside(method, keywords)
        return method
    if method is not None:
        must, do = "EAP(), EAPIG(...) or None", "such as EAPIG(steps=5)"
        raise TypeError(expected("method", must, repr(method), do))
    if options["steps"] is not None:
        return EAPIG(**options)
    _check_way(options["along"], options["rule"])
    for name in ("along", "rule", "step_batch"):
        if name in keywords:
            must, do = f"{defaults[name]!r} with steps=None", "give `steps` too, or leave it out"
            raise ValueError(expected(name, must, repr(keywords[name]), do))
    return EAP()


def _check_way(along: Any, rule: Any) -> None:
    """Raises ValueError for another way, or another rule of where on it."""
    checked_choice("along", along, ("inputs", "activations"))
    checked_choice("rule", rule, QUADRATURE_RULES)


@compiled("method")
def _edge_attribution(
    model: Transformer, pair: Pair, target: Target, *, method: EAP | EAPIG
) -> EdgeEffects:
    node_N, weight_N = method.rule_nodes()
    along, size = method.along, min(method.step_batch or node_N.size, node_N.size)
    at_once = along == "inputs" and size == node_N.size
    way = Way.of(model, pair, target)
    # An end of the way that is one of the steps needs no run of its own.
    among = {int(a): i for i, a in enumerate(node_N) if a in (0, 1)} if at_once else {}
    # In one batch, the ends may be among the steps; the changes come in after this forward.
    run = way.run(node_N, weight_N, tuple(among.values())) if at_once else None
    ends = [way.end(i) if run is None or i not in among else run.end(among[i]) for i in range(2)]
    (base_B, base), (source_B, source) = ends
    changes_WBTD = writer_changes(model, base, source, linear=True)
    if run is not None:
        effects_RWB = run.effects(changes_WBTD)
    else:
        way = replace(way, moved=(base, source) if along == "activations" else None)
        effects_RWB = _over_steps(way, changes_WBTD, node_N, weight_N, size)
    return EdgeEffects(
        effects=effects_RWB, base=base_B, source=source_B, graph=way.graph, method=str(method)
    )


def _over_steps(
    way: Way, changes_WBTD: Array, node_N: np.ndarray, weight_N: np.ndarray, size: int
) -> Float[Array, "R W B"]:
    """The effects, `size` steps at a time; along activations one group of writers at a time."""
    graph = way.graph
    # Steps that fill up the last chunk have weight zero.
    short = -node_N.size % size
    node_N, weight_N = np.pad(node_N, (0, short), mode="edge"), np.pad(weight_N, (0, short))
    chunks = [x.reshape(-1, size) for x in (node_N, weight_N)]
    group_W = np.zeros(graph.n_writers, int)
    if way.moved is not None:
        group_W = np.array(
            [
                0 if node.layer is None else way.group(node.layer, node.kind == "mlp")
                for node in graph.writers
            ]
        )
    groups = np.unique(group_W)  # along inputs, one group of all writers

    def add(total_RWB: Array, xs: tuple) -> tuple[Array, None]:
        group, node_N, weight_N = xs
        effects_RWB = way.run(node_N, weight_N, group=group).effects(changes_WBTD)
        # Each pass over a group's steps is for the effects of its own writers alone.
        in_group_W = jnp.asarray(group_W) == group
        return total_RWB + jnp.where(in_group_W[None, :, None], effects_RWB, 0), None

    zero = jnp.zeros((graph.n_readers, *changes_WBTD.shape[:2]), changes_WBTD.dtype)
    xs = (
        np.repeat(groups, len(chunks[0])),
        *(jnp.asarray(np.tile(x, (groups.size, 1)), zero.dtype) for x in chunks),
    )
    return jax.lax.scan(add, zero, xs)[0]
