"""What attention of one layer brings from every position, with all scales frozen."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float, over
from arrakis_jax.frozen.writes import written
from arrakis_jax.nn.transformer import Layer, Transformer

BROUGHT_FIELDS = ("resid_pre", "attn_out", "resid_mid", "pattern", "v", "norm_attn_scale",
        "norm_attn_out_scale")  # fmt: skip


class Brought(NamedTuple):
    """What attention of one layer brings from every source position j to every position i.

    The vector that head h brings is `share_i pattern[h,i,j] v[j,h] w_o[h]`, and position i itself
    brings `own_i`. With `bias_i`, which no position brings, they sum to `total_i`. All as written
    to the stream: through norms of the output and of the stream, scales as they were, and factors.

    Attributes:
        pattern: `[B,H,T,S]`, attention probabilities.
        v: `[B,S,H,K]`, values; those of a key/value head for each of its query heads.
        w_o: `[H,K,D]`.
        share: `[B,T]`.
        own: `[B,T,D]`, the stream that attention adds to.
        total: `[B,T,D]`, the stream after attention, before the MLP.
        brought: `[B,T,D]`, what heads bring from all positions together.
        bias: `[B,T,D]`, the output's bias and those of norms.
    """

    pattern: Float[Array, "B H T S"]
    v: Float[Array, "B S H K"]
    w_o: Float[Array, "H K D"]
    share: Float[Array, "B T"]
    own: Float[Array, "B T D"]
    total: Float[Array, "B T D"]
    brought: Float[Array, "B T D"]
    bias: Float[Array, "B T D"]


def attention_brought(model: Transformer, layer: Layer) -> Brought:
    """What attention of one layer brings from where; the layer has the fields `BROUGHT_FIELDS`."""
    config, stream, block = model.config, layer.stream, layer.block
    acc = config.acc
    through, share = written(config, stream, block.norm_attn_out, "attn")
    w_o = through(block.attn.w_o[...])
    own = stream.resid_pre.astype(acc)
    bias = _output_bias(model, layer)
    brought = stream.attn_out - bias
    if config.norms_stream:  # attention adds to the normed stream, or its sum is normed
        norm: Any = block.norm_attn
        own = norm.linear(own) / stream.norm_attn_scale[..., None]
        if config.norm_placement == "stream_after":
            w_o = norm.linear(w_o)
            share = share / stream.norm_attn_scale
            bias, brought = (
                norm.linear(x) / stream.norm_attn_scale[..., None] for x in (bias, brought)
            )
        bias = bias if norm.b is None else bias + over(norm.b[...].astype(acc), bias)
    if config.parallel:
        total = stream.resid_pre.astype(acc) + stream.attn_out
    else:
        total = stream.resid_mid.astype(acc)
    repeats = config.heads_per_group
    v = jnp.repeat(stream.v.astype(acc), repeats, -2)
    bias = jnp.where(stream.mask[..., None], bias, 0)
    return Brought(stream.pattern.astype(acc), v, w_o, share, own, total, brought, bias)


def _output_bias(model: Transformer, layer: Layer) -> Float[Array, "B T D"]:
    """The biases in `attn_out`: of the product, through the norm of the output, and of the norm."""
    stream, b_o, norm = layer.stream, layer.block.attn.b_o, layer.block.norm_attn_out
    acc = model.config.acc
    bias = jnp.zeros(stream.attn_out.shape, acc)
    if b_o is not None:
        through, share = written(model.config, stream, norm, "attn")
        bias = share[..., None] * over(through(b_o[...]), bias)
    if norm is not None and norm.b is not None:
        bias = bias + over(norm.b[...].astype(acc), bias) * model.config.residual_scale
    return jnp.where(stream.mask[..., None], bias, 0)
