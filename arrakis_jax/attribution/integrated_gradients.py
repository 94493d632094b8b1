"""Integrated gradients: the mean gradient on the way from a baseline to the input."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.chunks import evenly, weighted_sum
from arrakis_jax.attribution.inputs import Inputs, anywhere, checked_baseline
from arrakis_jax.attribution.method import FeatureMethod, check_size, check_whole
from arrakis_jax.attribution.result import Attribution
from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import checked_choice, host
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target
from arrakis_jax.nn.transformer import Transformer

QUADRATURE_RULES = ("gauss_legendre", "left", "right", "midpoint", "trapezoid")
# With steps=None they are doubled until every row's gap is small.
DOUBLINGS = (32, 64, 128, 256, 512)


def rule_nodes(rule: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The n nodes of a quadrature rule on [0, 1] (trapezoid: n + 1), and their weights.

    The weights sum to one.
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


@dataclass(frozen=True, kw_only=True)
class IntegratedGradients(FeatureMethod):
    """The mean gradient from a baseline to the input, for `feature_attribution(method=...)`.

    Attributes:
        rule: the quadrature: "gauss_legendre", "left", "right", "midpoint" or "trapezoid".
        steps: the rule's nodes (of "trapezoid" the intervals). None doubles them from 32 to 512
            until each row's gap is at most `tolerance`.
        tolerance: without `steps`, the largest gap; None for 1e-3.
        baseline: "mean" (None), "zero", a token id, `[B,T]` ids, or embeddings.
        step_batch: how many steps are run at once at most.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom")
        >>> method = IntegratedGradients(steps=8)
        >>> feature_attribution(model, tokens, 3, mask=mask, method=method).steps.tolist()
        [8]
    """

    name: ClassVar[str] = "integrated_gradients"
    rule: str = "gauss_legendre"
    steps: int | None = None
    tolerance: float | Array | None = None
    baseline: str | int | Array | None = None
    step_batch: int = 1

    def __post_init__(self) -> None:
        if self.steps is not None and self.tolerance is not None:
            do = "it says when to stop doubling them"
            raise ValueError(expected("tolerance", "None with `steps`", self.tolerance, do))
        checked_choice("rule", self.rule, QUADRATURE_RULES)
        if self.steps is not None:
            check_whole("steps", self.steps)
        check_whole("step_batch", self.step_batch)
        if self.tolerance is not None:
            check_size("tolerance", self.tolerance)

    def attribute(self, model, tokens, mask, target, *, check):  # noqa: D102
        baseline = checked_baseline(model.config, self.baseline, tokens, mask, check=check)
        if _singular(model, baseline, tokens, mask):
            warnings.warn(
                "a zero baseline in a model with RMSNorm and no learned positions makes "
                "integrated gradients unreliable: the norm's output jumps at zero; use the mean "
                "embedding (baseline=None)",
                stacklevel=3,
            )
        baseline = None if baseline is None else jnp.asarray(baseline)
        # An array, so that another tolerance compiles nothing.
        tolerance = 1e-3 if self.tolerance is None else self.tolerance
        tolerance = jnp.asarray(tolerance, model.config.acc)
        steps = None if self.steps is None else int(self.steps)
        result = _integrated_gradients(
            model, tokens, mask, target, baseline, tolerance,
            rule=self.rule, steps=steps, step_batch=int(self.step_batch),
        )  # fmt: skip
        if steps is None:
            _warn_of_gaps(model.config, host(result.gap), host(tolerance))
        return result


@compiled("rule", "steps", "step_batch")
def _integrated_gradients(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    target: Target,
    baseline: Array | None,
    tolerance: Float[Array, ""],
    *,
    rule: str,
    steps: int | None,
    step_batch: int,
) -> Attribution:
    """Integrated gradients with a number of steps, or doubled until the gap is small."""
    inputs, acc = Inputs.of(model, tokens, mask, target), model.config.acc
    start = inputs.baseline(baseline)
    way = inputs.e_BTD - start
    # A map and not a batch of both ends: memory is that of one.
    first, last = jax.lax.map(inputs.value, jnp.stack([start, inputs.e_BTD]))

    def share(alpha: Array) -> Float[Array, "B T"]:
        # Reduced to a number a token at once, so that no step's gradient `[B,T,D]` is kept.
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
    # One program for all doublings: their rules as rows of one array, filled up to one length.
    nodes, weights = zip(*(rule_nodes(rule, n) for n in DOUBLINGS), strict=True)
    counts = jnp.array([len(row) for row in nodes])
    nodes, weights = (
        jnp.asarray(_filled(rows, mode), zero.dtype)
        for rows, mode in ((nodes, "edge"), (weights, "constant"))
    )
    steps, at_once = jnp.array(DOUBLINGS), evenly(DOUBLINGS[0], step_batch)

    def again(state: tuple[Int[Array, ""], Attribution]) -> tuple[Array, Attribution]:
        level, previous = state
        shares = weighted_sum(share, nodes[level], weights[level], counts[level], at_once)
        fresh = result(shares, steps[level])
        # A row that was done keeps its result, so that it does not depend on the other rows.
        done = (previous.gap <= tolerance) & (level > 0)

        def keep(old: Array, new: Array) -> Array:
            return jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        return level + 1, jax.tree.map(keep, previous, fresh)

    def unfinished(state: tuple[Int[Array, ""], Attribution]) -> Array:
        level, previous = state
        # Not `gap > tolerance`: a gap of NaN is unfinished too.
        return (level < len(DOUBLINGS)) & jnp.any(~(previous.gap <= tolerance) | (level == 0))

    return jax.lax.while_loop(unfinished, again, (jnp.zeros((), int), result(zero, 0)))[1]


def _filled(rows: tuple[np.ndarray, ...], mode: Any) -> np.ndarray:
    """Rows as one array, each filled up to the length of the last."""
    most = len(rows[-1])
    return np.stack([np.pad(row, (0, most - len(row)), mode) for row in rows])


def _singular(model: Transformer, baseline: Any, tokens: Array, mask: Array | None) -> bool:
    """Whether a path starts where a norm jumps, as far as is known."""
    if baseline is None or model.config.norm != "rmsnorm" or model.w_pos is not None:
        return False
    values = host(baseline) if jnp.issubdtype(baseline.dtype, jnp.floating) else None
    return values is not None and anywhere(~values.any(-1), tokens, mask)


def _warn_of_gaps(config: ModelConfig, gap: np.ndarray | None, tolerance: Any) -> None:
    """Names the rows that all doublings leave open."""
    if gap is None or tolerance is None or (gap <= tolerance).all():
        return
    rows = np.flatnonzero(~(gap <= tolerance))
    warnings.warn(
        f"integrated gradients with {DOUBLINGS[-1]} steps leave a gap above {tolerance:.3g} in "
        f"rows {rows[:10].tolist()} (largest {gap.max():.2g}); "
        + (
            "where tokens change their experts on the way the logit jumps, so choose another "
            "`baseline`: more steps do not help"
            if config.n_experts
            else "pass more `steps`, or another `baseline`"
        ),
        stacklevel=4,
    )
