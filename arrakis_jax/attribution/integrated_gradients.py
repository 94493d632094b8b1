"""Integrated gradients: the mean gradient on the way from a baseline to the input."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.inputs import Inputs, evenly, weighted_sum
from arrakis_jax.attribution.result import Attribution
from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.numerics import ratio
from arrakis_jax.forward.run import compiled

RULES = ("gauss_legendre", "left", "right", "midpoint", "trapezoid")
# With steps=None they are doubled until every row's gap is small.
DOUBLINGS = (32, 64, 128, 256, 512)


def rule_nodes(rule: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of n steps of a quadrature rule on [0, 1].

    n of them (the trapezoid rule: n + 1), of which the weights sum to one.
    """
    if rule == "gauss_legendre":
        node, weight = np.polynomial.legendre.leggauss(n)
        return (1 + node) / 2, weight / 2
    if rule == "trapezoid":
        weight = np.full(n + 1, 1 / n)
        weight[[0, -1]] /= 2
        return np.arange(n + 1) / n, weight
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[rule]
    return (np.arange(n) + shift) / n, np.full(n, 1 / n)


@compiled("rule", "steps", "step_batch")
def integrated_gradients(
    model, tokens, mask, target, *, baseline, tolerance, rule, steps, step_batch
):
    """Integrated gradients with a number of steps, or doubled until the gap is small."""
    inputs, acc = Inputs.of(model, tokens, mask, target), model.config.acc
    start = inputs.baseline(baseline)
    way = inputs.e_BTD - start
    first, last = jax.lax.map(inputs.value, jnp.stack([start, inputs.e_BTD]))

    def share(alpha: Array) -> Float[Array, "B T"]:
        return jnp.sum(inputs.gradient(start + alpha * way) * way, -1)

    def result(shares: Float[Array, "B T"], steps: int | Array) -> Attribution:
        delta = shares.sum(-1) - (last - first)
        gap = ratio(jnp.abs(delta), jnp.abs(shares).sum(-1))
        taken = jnp.full(tokens.shape[:1], steps)
        return inputs.result(shares, last, gap=gap, delta=delta, steps=taken)

    if steps is None:
        return _doubled(share, result, jnp.zeros(tokens.shape, acc), tolerance, rule, step_batch)
    node, weight = (jnp.asarray(x, acc) for x in rule_nodes(rule, steps))
    at_once = evenly(len(node), step_batch)
    return result(weighted_sum(share, node, weight, len(node), at_once), steps)


def _doubled(
    share: Callable[[Array], Array],
    result: Callable[[Array, int | Array], Attribution],
    zero: Float[Array, "B T"],
    tolerance: Float[Array, ""],
    rule: str,
    step_batch: int,
) -> Attribution:
    """Steps doubled until every row's gap is within the tolerance."""
    nodes, weights = zip(*(rule_nodes(rule, n) for n in DOUBLINGS), strict=True)
    counts = jnp.array([len(row) for row in nodes])
    nodes, weights = (
        jnp.asarray(_filled(rows, mode), zero.dtype)
        for rows, mode in ((nodes, "edge"), (weights, "constant"))
    )
    steps, at_once = jnp.array(DOUBLINGS), evenly(DOUBLINGS[0], step_batch)

    def again(state: tuple[Int[Array, ""], Attribution]) -> tuple[Array, Attribution]:
        level, held = state
        shares = weighted_sum(share, nodes[level], weights[level], counts[level], at_once)
        fresh = result(shares, steps[level])
        # A row that was done keeps its result, so that it does not depend on the other rows.
        done = (held.gap <= tolerance) & (level > 0)

        def keep(old: Array, new: Array) -> Array:
            return jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        return level + 1, jax.tree.map(keep, held, fresh)

    def unfinished(state: tuple[Int[Array, ""], Attribution]) -> Array:
        level, held = state
        return (level < len(DOUBLINGS)) & jnp.any(~(held.gap <= tolerance) | (level == 0))

    return jax.lax.while_loop(unfinished, again, (jnp.zeros((), int), result(zero, 0)))[1]


def _filled(rows: tuple[np.ndarray, ...], mode: Any) -> np.ndarray:
    """Rows as one array, each filled up to the length of the last."""
    most = len(rows[-1])
    return np.stack([np.pad(row, (0, most - len(row)), mode) for row in rows])
