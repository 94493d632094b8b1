"""Causal self-attention with grouped key/value heads; the heads are an axis of their own."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from arrakis_jax.axes import Array, Bool, Int
from arrakis_jax.config import ModelConfig
from arrakis_jax.nn.linear import affine, constant, product, weight, writers
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

    def __call__(
        self,
        x_BTD: Array,
        rotation: tuple[Array, Array] | None,
        allowed_BTS: Bool[Array, "B T S"],
        layer: Int[Array, ""],
        site: Sites,
    ) -> Array:
        """What attention writes to the stream, `[B,T,D]`, before the mask of padding."""
        cfg = self.config
        q_BTHK = affine("BTD,DHK->BTHK", x_BTD, self.w_q, self.b_q, self.config)
        k_BTGK = affine("BTD,DGK->BTGK", x_BTD, self.w_k, self.b_k, self.config)
        v_BTGK = affine("BTD,DGK->BTGK", x_BTD, self.w_v, self.b_v, self.config)
        if rotation is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *rotation), rotate(k_BTGK, *rotation)
        q_BTHK = site("q", q_BTHK)
        k_BSGK = site("k", k_BTGK)
        v_BSGK = site("v", v_BTGK)

        q_BTGRK = rearrange(q_BTHK, "B T (G R) K -> B T G R K", G=cfg.n_kv_heads)
        scores_BGRTS = product("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, config=cfg)
        scores_BGRTS *= self._scale(layer)
        allowed = allowed_BTS[:, None, None]
        # A finite minimum and a second `where`: rows of padding have no key at all.
        scores_BGRTS = jnp.where(allowed, scores_BGRTS, jnp.finfo(cfg.acc).min)
        pattern_BGRTS = jnp.where(allowed, jax.nn.softmax(scores_BGRTS, axis=-1), 0)
        pattern_BHTS = rearrange(pattern_BGRTS, "B G R T S -> B (G R) T S")
        pattern_BHTS = site("pattern", pattern_BHTS, axis=2)

        pattern_BGRTS = rearrange(pattern_BHTS, "B (G R) T S -> B G R T S", G=cfg.n_kv_heads)
        z_BTGRK = product("BGRTS,BSGK->BTGRK", pattern_BGRTS, v_BSGK, config=cfg)
        # In the weights' dtype, so that the heads' terms are those that the product below sums.
        z_BTHK = rearrange(z_BTGRK, "B T G R K -> B T (G R) K").astype(cfg.dtype)
        z_BTHK = site("z", z_BTHK)
        return affine("BTHK,HKD->BTD", z_BTHK, self.w_o, self.b_o, self.config)

    def _scale(self, layer: Int[Array, ""]) -> Array | float:
        scale = self.config.attention_scale
        scale = self.config.d_head**-0.5 if scale is None else scale
        return scale / (layer + 1) if self.config.scale_by_inverse_layer else scale
