"""The effects of patching a query or a key, with softmax taken as it is and not to first order.

Where attention is saturated its slope is zero, and does not tell what another query or key would
do. So the change of the pattern is computed, and only what follows it is linear.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.numerics import contract
from arrakis_jax.nn.attention import Attention
from arrakis_jax.nn.context import AttentionContext, AttentionContexts
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Place, walk
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ResidualStream

# What a run must capture for `qk_effects`.
QKV_FIELDS = ("q", "k", "v")


def qk_effects(
    model: Transformer,
    base: ResidualStream,
    g_LBTHK: Float[Array, "L B T H K"],
    source: dict[str, Array],
    mask: Array | None,
) -> dict[str, Array]:
    """Effects of each query `[L,B,T,H]` and each key `[L,B,T,G]` that becomes the source's.

    `base` holds `QKV_FIELDS`, `g` is the gradient at z, `source` has the "q" or "k" put in place.
    """
    contexts = AttentionContexts.of(model.config, Padding.of(base.mask.shape, mask))

    def of_layer(_: None, place: Place, xs: tuple) -> tuple[None, dict[str, Array]]:
        attn, layer = place.block.attn, place.index
        return None, layer_effects(attn, contexts.at(layer), layer, *xs)

    captured = {name: getattr(base, name) for name in QKV_FIELDS}
    return walk(model, of_layer, None, (captured, g_LBTHK, source)).found


def layer_effects(
    attn: Attention,
    context: AttentionContext,
    layer: Int[Array, ""],
    base: dict[str, Array],
    g_BTHK: Float[Array, "B T H K"],
    source: dict[str, Array],
) -> dict[str, Any]:
    """`qk_effects` in one layer: `[B,T,H]` for queries, `[B,T,G]` for keys."""
    q_BTHK, k_BSGK, v_BSGK = (base[name] for name in QKV_FIELDS)
    n_kv, n_keys = attn.config.n_kv_heads, k_BSGK.shape[1]
    g_BTGRK = rearrange(g_BTHK, "B T (G R) K -> B T G R K", G=n_kv)
    g_BGRTS = contract("BTGRK,BSGK->BGRTS", g_BTGRK, v_BSGK)  # the gradient at the pattern

    def scores(q_BTHK: Array, k_BSGK: Array) -> Array:
        return attn.scores(q_BTHK, k_BSGK, context, layer)

    scores_BGRTS, effects = scores(q_BTHK, k_BSGK), {}
    # A sink is one more key without a value, so the gradient at its share is zero.
    sinks = scores_BGRTS.shape[-1] - n_keys
    g_BGRTS = jnp.pad(g_BGRTS, [(0, 0)] * 4 + [(0, sinks)])
    if "q" in source:
        patched = scores(jnp.broadcast_to(source["q"], q_BTHK.shape), k_BSGK)
        change = jax.nn.softmax(patched, -1) - jax.nn.softmax(scores_BGRTS, -1)
        effects["q"] = rearrange((g_BGRTS * change).sum(-1), "B G R T -> B T (G R)")
    if "k" in source:
        change = scores(q_BTHK, jnp.broadcast_to(source["k"], k_BSGK.shape)) - scores_BGRTS
        # One key serves a group of query heads (R) and all later queries (T): sum over both.
        of_k_BGS = of_keys(scores_BGRTS, change, g_BGRTS).sum((2, 3))[..., :n_keys]
        effects["k"] = rearrange(of_k_BGS, "B G S -> B S G")
    return effects


def of_keys(
    scores: Float[Array, "... S"], change: Float[Array, "... S"], g: Float[Array, "... S"]
) -> Float[Array, "... S"]:
    """`sum_j g_j (A'_j - A_j)` if the score of one key alone changes, for each key.

    With A its share, A' = sigmoid(logit(A) + change), and the others keep their proportions. So the
    sum is `(A' - A) (g - the mean of g over the others)`.
    """
    # The key with the largest score may have a share that rounds to one, where logit(A) and the
    # mean over the others divide by 1 - A = 0. For it both come from a softmax of the others.
    top = jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=bool)
    others = jnp.where(top, jnp.finfo(scores.dtype).min, scores)
    log_share = jax.nn.log_softmax(scores, -1)
    share = jnp.where(top, 0, jnp.exp(log_share))  # at most a half, so 1 - share is safe
    logit = jnp.where(
        top,
        scores - jax.nn.logsumexp(others, -1, keepdims=True),
        log_share - jnp.log1p(-share),
    )
    mean = (jnp.exp(log_share) * g).sum(-1, keepdims=True)
    mean_of_others = jnp.where(
        top,
        (jax.nn.softmax(others, -1) * g).sum(-1, keepdims=True),
        (mean - share * g) / (1 - share),
    )
    return (jax.nn.sigmoid(logit + change) - jax.nn.sigmoid(logit)) * (g - mean_of_others)
