"""How well estimated effects agree with exact ones: ranks, signs, and missed effects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.checks import checked_numbers
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.patching.effects import Effects
from arrakis_jax.results.record import Record


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Agreement(Record):
    """How an estimate of C effects agrees with the exact ones, for each example; NaN if one is NaN.

    Attributes:
        rank_correlation: `[B]`, Spearman's, with average ranks for ties; NaN where either has no
            order.
        sign_agreement: `[B]`, the share of terms whose signs are equal.
        top_overlap: `[B]`: of the k exact effects of largest absolute value, the share that is also
            among the k largest estimates.
        false_negatives: `[B]`: of these k exact effects, the share that is not even among the
            largest tenth of the estimates.
        n: `[B]`, how many terms were compared: those with an exact effect above `least`.
        share: k as a share of the n terms.
    """

    rank_correlation: Float[Array, " B"]
    sign_agreement: Float[Array, " B"]
    top_overlap: Float[Array, " B"]
    false_negatives: Float[Array, " B"]
    n: Float[Array, " B"]
    share: float = field(metadata={"static": True})


def agreement(
    found: Any, exact: Any, *, least: float | Array = 0.0, share: float = 0.01
) -> Agreement:
    """Compares estimated with exact effects, for each example.

    Args:
        found: effects `[...,B]`, or a result of patching (of the same cells as `exact`). To
            compare means over examples, pass `found.mean().mean[..., None]`.
        exact: likewise.
        least: the noise, a number or `[B]`: only terms whose exact effect is larger in absolute
            value are compared.
        share: the share of the compared terms that count as the largest, at least one term.

    Returns:
        An Agreement.

    Raises:
        TypeError, ValueError: for effects of unequal shape or cells, or a share outside of (0, 1].

    Example:
        >>> exact = jnp.array([[3.0], [-2.0], [0.5]])
        >>> agreement(2 * exact, exact).rank_correlation
        Array([1.], dtype=float32)

    Reference:
        Kramar et al. 2024 (AtP*), who count false negatives; Spearman's correlation with average
        ranks.
    """
    both = isinstance(found, Effects) and isinstance(exact, Effects)
    if both and found.labels != exact.labels:
        do = "ask for the same sites and axes, in the same order"
        raise ValueError(expected("found", f"of {exact.labels}", f"{found.labels}", do))
    do = "pass the scores `[...,B]`, or a result of patching"
    found, exact = (
        x.terms if isinstance(x, Effects) else checked_numbers(name, x, do)
        for name, x in (("found", found), ("exact", exact))
    )
    if found.shape != exact.shape or exact.ndim < 2:
        do = "compare the same cells, with the examples last"
        must = f"of exact's shape {exact.shape}, `[...,B]`"
        raise ValueError(expected("found", must, f"shape {found.shape}", do))
    if not 0 < share <= 1:
        raise ValueError(expected("share", "in (0, 1]", share, "0.01 is the largest hundredth"))
    n_rows = exact.shape[-1]
    least = jnp.broadcast_to(jnp.asarray(least, exact.dtype), (n_rows,))
    return _agreement(found.reshape(-1, n_rows), exact.reshape(-1, n_rows), least, share=share)


def _agreement(found_CB: Array, exact_CB: Array, least_B: Array, *, share: float) -> Agreement:
    acc = jnp.promote_types(exact_CB.dtype, jnp.float32)
    values = (found_CB.astype(acc).T, exact_CB.astype(acc).T, least_B.astype(acc))
    measures = jax.vmap(lambda *row: _of_row(*row, share=share))(*values)
    return Agreement(**measures, share=share)


def _of_row(found_C: Array, exact_C: Array, least: Array, *, share: float) -> dict[str, Array]:
    kept_C = ~(jnp.abs(exact_C) <= least)  # NaN is compared, and shows
    n = kept_C.sum()
    # -1 ranks the terms that are not compared behind all others.
    size = jnp.where(kept_C, jnp.abs(exact_C), -1)
    guess = jnp.where(kept_C, jnp.abs(found_C), -1)
    place, guessed = (jnp.argsort(jnp.argsort(-x)) for x in (size, guess))  # ranks from 0
    k = jnp.ceil(share * n - 1e-4)  # a hair less, so that 0.07 of 100 are 7, whatever the rounding
    largest = place < k
    same = jnp.sign(found_C) == jnp.sign(exact_C)

    def part(of: Array, among: Array) -> Array:
        return jnp.sum(of & among) / jnp.sum(among)

    measures = {
        "rank_correlation": rank_correlation(found_C, exact_C, kept_C),
        "sign_agreement": part(same, kept_C),
        "top_overlap": part(guessed < k, largest),
        "false_negatives": part(guessed >= jnp.maximum(jnp.ceil(0.1 * n), k), largest),
    }
    # One NaN makes every measure of its example NaN; a comparison alone would hide it.
    broken = jnp.any(kept_C & jnp.isnan(found_C + exact_C))
    return {name: jnp.where(broken, jnp.nan, x) for name, x in measures.items()} | {"n": n}


def rank_correlation(
    a: Float[Array, " C"], b: Float[Array, " C"], kept: Bool[Array, " C"]
) -> Float[Array, ""]:
    """Spearman's rank correlation of the terms kept, with average ranks for ties."""
    a, b = (_ranks(x, kept) for x in (a, b))
    n = kept.sum()
    a, b = (jnp.where(kept, x - x.sum() / n, 0) for x in (a, b))
    return contract("C,C->", a, b) / jnp.sqrt(jnp.square(a).sum() * jnp.square(b).sum())


def _ranks(x: Float[Array, " C"], kept: Bool[Array, " C"]) -> Float[Array, " C"]:
    """Average ranks among those kept, zero elsewhere."""
    # A value's tie has ranks below + 1 to up_to, counted from 1; their mean is the average rank.
    ordered = jnp.sort(jnp.where(kept, x, jnp.inf))
    below, up_to = (jnp.searchsorted(ordered, x, side=side) for side in ("left", "right"))
    return jnp.where(kept, (below + up_to + 1) / 2, 0).astype(x.dtype)
