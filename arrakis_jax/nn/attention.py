"""Causal self-attention with grouped key/value heads. The heads have their own axis."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from arrakis_jax.core.axes import Array, Int, over
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.context import AttentionContext
from arrakis_jax.nn.linear import affine, constant, flat_affine, product, softcap, weight, writers
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.rotary import rotate
from arrakis_jax.nn.site import Sites


class Attention(nnx.Module):
    """`out = sum_h softmax(q_h k_g^T * scale) v_g w_o[h] + b_o`, with `g = h // (H / G)`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]):
        d, h, g, k = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
        self.config = config
        self.w_q = weight(rngs, (*stack, d, h, k), d, config)
        self.w_k = weight(rngs, (*stack, d, g, k), d, config)
        self.w_v = weight(rngs, (*stack, d, g, k), d, config)
        self.w_o = weight(rngs, (*stack, h, k, d), writers(config) * h * k, config)
        bias = config.qkv_bias
        self.b_q = constant((*stack, h, k), 0.0, config) if bias else None
        self.b_k = constant((*stack, g, k), 0.0, config) if bias else None
        self.b_v = constant((*stack, g, k), 0.0, config) if bias else None
        self.b_o = constant((*stack, d), 0.0, config) if config.out_bias else None
        self.norm_q = _qk_norm(config, stack, h)
        self.norm_k = _qk_norm(config, stack, g)
        self.sinks = constant((*stack, h), 0.0, config) if config.sinks else None

    def __call__(
        self,
        inputs: tuple[Array, Array, Array],
        context: AttentionContext,
        layer: Int[Array, ""],
        site: Sites,
    ) -> Array:
        """The sum of all heads and the output bias, `[B,T,D]`. Padding is not masked yet.

        `inputs` are the inputs of queries, keys and values: `[B,T,D]`, or `[B,T,heads,D]`.
        """
        cfg = self.config
        x_q, x_k, x_v = inputs
        q_BTHK = _projected(x_q, self.w_q, self.b_q, cfg)
        k_BTGK = _projected(x_k, self.w_k, self.b_k, cfg)
        v_BTGK = _projected(x_v, self.w_v, self.b_v, cfg)
        if self.norm_q is not None and self.norm_k is not None:
            q_BTHK = self.norm_q(q_BTHK, site, "norm_q_scale")
            k_BTGK = self.norm_k(k_BTGK, site, "norm_k_scale")
        if (limit := cfg.clip_qkv) is not None:
            q_BTHK, k_BTGK, v_BTGK = (jnp.clip(x, -limit, limit) for x in (q_BTHK, k_BTGK, v_BTGK))
        if context.rotation is not None:
            q_BTHK, k_BTGK = (
                rotate(x, *context.rotation, interleaved=cfg.rope_interleaved)
                for x in (q_BTHK, k_BTGK)
            )
        # The sites come after norm, clip and rotation: the scores are products of these q and k.
        q_BTHK = site("q", q_BTHK)
        k_BSGK = site("k", k_BTGK)
        v_BSGK = site("v", v_BTGK)
        # Keys and values of earlier tokens went through their sites in their own forward.
        if context.before is not None:
            pairs = zip(context.before, (k_BSGK, v_BSGK), strict=True)
            k_BSGK, v_BSGK = (jnp.concatenate(pair, 1) for pair in pairs)

        scores_BGRTS = self.scores(q_BTHK, k_BSGK, context, layer)
        pattern_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1)
        allowed = context.allowed[:, None, None]
        # The slice drops the column of the sinks. The `where` sets rows without any key to zero,
        # where softmax gives every key the same share.
        pattern_BGRTS = jnp.where(allowed, pattern_BGRTS[..., : allowed.shape[-1]], 0)
        pattern_BHTS = rearrange(pattern_BGRTS, "B G R T S -> B (G R) T S")
        pattern_BHTS = site("pattern", pattern_BHTS, axis=2)

        pattern_BGRTS = rearrange(pattern_BHTS, "B (G R) T S -> B G R T S", G=cfg.n_kv_heads)
        # The heads are batch axes in front in both products: on CPU, XLA copies other orders.
        z_BGRTK = product("BGRTS,BSGK->BGRTK", pattern_BGRTS, v_BSGK, config=cfg)
        # Cast to the dtype of the product below, so that the recorded z is exactly what it sums.
        z_BTHK = rearrange(z_BGRTK, "B G R T K -> B T (G R) K").astype(cfg.operands)
        z_BTHK = site("z", z_BTHK)
        return flat_affine(z_BTHK, self.w_o, self.b_o, cfg, n_in=2)

    def scores(
        self, q_BTHK: Array, k_BSGK: Array, context: AttentionContext, layer: Int[Array, ""]
    ) -> Array:
        """The scores before softmax, `[B,G,R,T,S]`; with sinks `[B,G,R,T,S+1]`.

        A key that may not be read has the least finite number.
        """
        cfg, scale = self.config, self.config.score_scale(layer)
        q_BGRTK = rearrange(q_BTHK, "B T (G R) K -> B G R T K", G=cfg.n_kv_heads)
        scores_BGRTS = product("BGRTK,BSGK->BGRTS", q_BGRTK, k_BSGK, config=cfg)
        # Falcon adds ALiBi's bias before the scale, other models after it.
        bias = context.bias
        if bias is not None:
            bias = rearrange(bias, "B (G R) S -> B G R 1 S", G=cfg.n_kv_heads)
            bias = bias * scale if cfg.falcon_alibi else bias
        scores_BGRTS = softcap(scores_BGRTS * scale, cfg.attention_softcap)
        scores_BGRTS = scores_BGRTS if bias is None else scores_BGRTS + bias
        allowed = context.allowed[:, None, None]
        # Finite, because a row of padding has no key: softmax of -inf alone would be NaN.
        scores_BGRTS = jnp.where(allowed, scores_BGRTS, jnp.finfo(cfg.acc).min)
        # A sink is one more key without a value: it takes probability and writes nothing.
        if self.sinks is not None:
            sinks = self.sinks[...].astype(cfg.acc).reshape(cfg.n_kv_heads, -1, 1, 1)
            sinks = jnp.broadcast_to(over(sinks, scores_BGRTS), (*scores_BGRTS.shape[:-1], 1))
            scores_BGRTS = jnp.concatenate([scores_BGRTS, sinks], -1)
        return scores_BGRTS


def _projected(x: Array, w: nnx.Param, b: nnx.Param | None, config: ModelConfig) -> Array:
    """Queries, keys or values. The heads share one input or have one each."""
    if x.ndim == 3:
        return flat_affine(x, w, b, config)
    return affine("BTHD,DHK->BTHK", x, w, b, config)


def _qk_norm(config: ModelConfig, stack: tuple[int, ...], n_heads: int) -> Norm | None:
    """The norm of queries or keys, over each head or over all heads at once."""
    if config.qk_norm is None:
        return None
    shape = (config.d_head,) if config.qk_norm == "head" else (n_heads, config.d_head)
    over_last = 2 if config.qk_norm == "all_heads" else 1
    return Norm(config, stack, shape=shape, over_last=over_last, bias=config.qk_norm_bias)
