"""Does the output need the tokens that an attribution names? Take them away and see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.inputs import Inputs, checked_baseline
from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import (
    Mask,
    Tokens,
    checked_count,
    checked_numbers,
    checked_seed,
    checked_tokens,
    host,
)
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Curves(Record):
    """How a target falls as tokens are taken away in some order, and rises as they come back.

    Attributes:
        deletion: `[T+1,B]`, the target without the first k tokens of the order, k = 0 to T. A row
            of fewer tokens keeps its last value.
        insertion: `[T+1,B]`, the target with the first k tokens alone.
        deletion_auc: `[B]`, the area under the deletion curve over the share of tokens taken away,
            the mean target on the way (`TokenFaithfulness.normalised`): small is good.
        insertion_auc: `[B]`, likewise: large is good.
        comprehensiveness: `[B]`, how much the target falls without the first 1, 5, 10, 20 and 50 %
            of the tokens (rounded up), on average: large is good.
        sufficiency: `[B]`, how much it falls with these tokens alone: small is good.
    """

    deletion: Float[Array, "K B"]
    insertion: Float[Array, "K B"]
    deletion_auc: Float[Array, " B"]
    insertion_auc: Float[Array, " B"]
    comprehensiveness: Float[Array, " B"]
    sufficiency: Float[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class TokenFaithfulness(Record):
    """The curves of an attribution's order of tokens, and of control orders.

    Attributes:
        found: the attribution's, the largest first.
        reversed: the smallest first.
        random: `[N,...]`, N random orders, each followed by its reverse.
        n_tokens: `[B]`, how many tokens each row has that can be taken away.
        full: `[B]`, the target with all of them.
        empty: `[B]`, with none.
    """

    found: Curves
    reversed: Curves
    random: Curves
    n_tokens: Int[Array, " B"]
    full: Float[Array, " B"]
    empty: Float[Array, " B"]

    def normalised(self, target: Float[Array, "... B"]) -> Float[Array, "... B"]:
        """A target or an area as a share: 0 with no tokens, 1 with all.

        Where all tokens together hardly change the target, it divides by almost zero: over many
        examples, rather divide the means.
        """
        empty, full = (jnp.broadcast_to(x, target.shape) for x in (self.empty, self.full))
        return (target - empty) / (full - empty)


def token_faithfulness(
    model: Transformer,
    tokens: Tokens,
    scores: Float[Array, "B T"],
    target: Any,
    *,
    mask: Mask | None = None,
    baseline: str | int | Array | None = None,
    first: bool = False,
    draws: int = 10,
    seed: int = 0,
    step_batch: int = 1,
    check: bool = False,
) -> TokenFaithfulness:
    """Deletion and insertion curves of scores of tokens, and the measures made from them.

    A token is taken away by putting the baseline in place of its embedding; its position stays.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids.
        scores: `[B,T]`, by which the tokens are ordered, the largest first; for example
            `feature_attribution(...).tokens`. They should be signed: more of it, more target.
        target: a target, or token ids whose logit it is.
        mask: `[B,T]`.
        baseline: as in `feature_attribution`: "mean" (None), "zero", a token id, `[B,T]` ids of a
            counterfactual prompt, or embeddings.
        first: whether each row's first token (BOS) can be taken away too.
        draws: how many random orders are made, an even number.
        seed: of these. A row's orders depend on its own tokens alone, not on its batch.
        step_batch: how many forwards are run at once; bounds memory.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        A TokenFaithfulness. Costs `(2 + draws) (T + 1)` forwards.

    Raises:
        TypeError, ValueError, IndexError: for tokens, scores or a target that do not fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> goal = Logit(alice, tom)
        >>> scores = feature_attribution(model, tokens, goal, mask=mask).tokens
        >>> token_faithfulness(model, tokens, scores, goal, mask=mask).random.deletion_auc.shape
        (10, 1)

    Reference:
        Samek et al. 2017 and Petsiuk et al. 2018 (deletion and insertion); DeYoung et al. 2020
        (comprehensiveness and sufficiency).
    """
    tokens, mask = checked_tokens(model.config, tokens, mask, check=check)
    target = checked_target(model, tokens, target, mask)
    scores = checked_numbers("scores", scores, "pass the scores, such as its `.tokens`")
    if scores.shape != tokens.shape:
        do = "give a score for each token"
        raise ValueError(
            expected("scores", f"of the tokens' shape {tokens.shape}", f"shape {scores.shape}", do)
        )
    real = None if mask is None else host(mask)
    values = host(scores, check)
    if values is not None and np.isnan(values if real is None else values[real]).any():
        raise ValueError(expected("scores", "numbers that have an order", "NaN", "see its target"))
    shortest = tokens.shape[1] if real is None else int(real.sum(-1).min())
    if shortest < 2 and not first:
        do = "drop such rows, or pass first=True"
        raise ValueError(expected("tokens", "two real tokens long or more", shortest, do))
    if not isinstance(draws, int | np.integer) or draws < 2 or draws % 2:
        do = "every random order is followed by its reverse"
        raise ValueError(expected("draws", "an even number from 2 on", draws, do))
    checked_count("step_batch", step_batch, 10**6)
    baseline = checked_baseline(model.config, baseline, tokens, mask, check=check)
    baseline = None if baseline is None else jnp.asarray(baseline)
    return _token_faithfulness(
        model, tokens, mask, scores, target, baseline, checked_seed(seed),
        first=bool(first), draws=int(draws), step_batch=int(step_batch),
    )  # fmt: skip


@compiled("first", "draws", "step_batch")
def _token_faithfulness(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    scores: Float[Array, "B T"],
    target: Target,
    baseline: Array | None,
    seed: Array,
    *,
    first: bool,
    draws: int,
    step_batch: int,
) -> TokenFaithfulness:
    inputs = Inputs.of(model, tokens, mask, target)
    padding, width = inputs.padding, tokens.shape[1]
    # The tokens that may be taken away.
    free_BT = padding.real if first else padding.real & (padding.rank > 0)
    n_B = free_BT.sum(-1)
    b_BTD = inputs.baseline(baseline)

    key = jax.random.key(seed)
    random = jax.vmap(lambda draw: _random(key, inputs, draw))(jnp.arange(draws // 2))
    orders = jnp.concatenate([scores[None].astype(random.dtype), random])
    rank = jax.vmap(lambda order: _ranked(order, free_BT))(orders)
    # Each order and its reverse, next to each other: to insert the first k tokens of an order is to
    # delete the first n - k of its reverse. So insertions need no forwards of their own.
    rank_NBT = jnp.stack([rank, jnp.where(free_BT[None], (n_B[:, None] - 1)[None] - rank, rank)], 1)
    rank_NBT = rank_NBT.reshape(-1, *tokens.shape)

    def without(at: tuple[Array, Array]) -> Float[Array, " B"]:
        rank_BT, k = at
        gone_BT = free_BT & (rank_BT < k)
        return inputs.value(jnp.where(gone_BT[..., None], b_BTD, inputs.e_BTD))

    # Every order with every k, in one list, so that `step_batch` batches across both.
    n_orders, ks = len(rank_NBT), jnp.arange(width + 1)
    every = jnp.repeat(rank_NBT, width + 1, 0), jnp.tile(ks, n_orders)
    value = jax.lax.map(without, every, batch_size=step_batch)
    deletion_NKB = value.reshape(n_orders, width + 1, -1)
    left_KB = jnp.maximum(n_B[None] - ks[:, None], 0)
    pairs = deletion_NKB.reshape(-1, 2, *deletion_NKB.shape[1:])[:, ::-1]
    insertion_NKB = jnp.take_along_axis(pairs.reshape(deletion_NKB.shape), left_KB[None], 1)

    curves = jax.vmap(lambda d, i: _curves(d, i, n_B))(deletion_NKB, insertion_NKB)
    found, reverse = (jax.tree.map(lambda x, i=i: x[i], curves) for i in (0, 1))
    return TokenFaithfulness(
        found=found,
        reversed=reverse,
        random=jax.tree.map(lambda x: x[2:], curves),
        n_tokens=n_B,
        full=deletion_NKB[0, 0],
        empty=deletion_NKB[0, -1],
    )


def _curves(deletion_KB: Array, insertion_KB: Array, n_B: Array) -> Curves:
    """The curves of one order, and the measures made from them."""
    full_B = deletion_KB[0]

    def area(curve_KB: Array) -> Float[Array, " B"]:
        # Trapezoids of width 1 / n, for each row's own n.
        between_KB = (curve_KB[1:] + curve_KB[:-1]) / 2
        steps = jnp.arange(between_KB.shape[0])[:, None] < n_B[None]
        return jnp.where(steps, between_KB, 0).sum(0) / n_B

    def loss(curve_KB: Array) -> Float[Array, " B"]:
        # A hair less, so that 0.1 of 10 tokens is one, whatever its rounding.
        share = jnp.array(SHARES, full_B.dtype)[:, None]
        k = jnp.maximum(jnp.ceil(share * n_B[None] - 1e-4), 1).astype(int)
        return full_B - jnp.take_along_axis(curve_KB, k, 0).mean(0)

    return Curves(
        deletion=deletion_KB,
        insertion=insertion_KB,
        deletion_auc=area(deletion_KB),
        insertion_auc=area(insertion_KB),
        comprehensiveness=loss(deletion_KB),
        sufficiency=loss(insertion_KB),
    )


def _ranked(order_BT: Float[Array, "B T"], free_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Each free token's rank from the largest down, ties in order of position; the rest last."""
    # The last key of lexsort is the first to decide; argsort of the order is each token's rank.
    return jnp.argsort(jnp.lexsort((-order_BT, ~free_BT)), -1)


def _random(key: Array, inputs: Inputs, draw: Array) -> Float[Array, "B T"]:
    """Random numbers that depend on a row's own tokens and positions, not on its batch."""
    position_BT, real_BT = inputs.padding.rank, inputs.padding.real
    # A number for each row, from its ids and positions, that seeds its draws.
    sum_B = jnp.where(real_BT, (inputs.ids + 1) * (2 * position_BT + 1), 0).sum(-1)

    def row(number: Array, position_T: Array) -> Float[Array, " T"]:
        key_of_row = jax.random.fold_in(jax.random.fold_in(key, number), draw)
        return jax.vmap(lambda p: jax.random.uniform(jax.random.fold_in(key_of_row, p)))(position_T)

    return jax.vmap(row)(sum_B, position_BT)
