"""The vectors that attention in one layer brings from every position, with scales frozen."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float, over
from arrakis_jax.frozen.writes import written
from arrakis_jax.nn.transformer import Layer, Transformer

BROUGHT_FIELDS = ("resid_pre", "attn_out", "resid_mid", "pattern", "v", "norm_attn_scale",
        "norm_attn_out_scale")  # fmt: skip


class Brought(NamedTuple):
    """The vectors that attention in one layer brings from source position j to position i.

    Head h brings `share_i pattern[h,i,j] v[j,h] w_o[h]`, and position i itself brings `own_i`.
    With `bias_i`, which no position brings, they sum to `total_i`. All vectors are as written to
    the stream: after norms of the output and of the stream, scales frozen, and after factors.

    Attributes:
        pattern: `[B,H,T,S]`, attention probabilities.
        v: `[B,S,H,K]`, values. Query heads that share a key/value head have equal values.
        w_o: `[H,K,D]`.
        share: `[B,T]`.
        own: `[B,T,D]`, the stream that attention adds to.
        total: `[B,T,D]`, the stream after attention, before the MLP.
        brought: `[B,T,D]`, the sum over heads and source positions.
        bias: `[B,T,D]`, the biases of the output and of norms.
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
    """The vectors that one layer's attention brings. The layer must have `BROUGHT_FIELDS`.

    Raises ValueError if an edit changed what heads bring on their way, as values and patterns then
    do not say what was brought.
    """
    config, stream, block = model.config, layer.stream, layer.block
    do = "use method='attention', or edit 'pattern' or 'v', from which flow is computed"
    stream.need_unedited(("z", "attn_out", "resid_mid"), "flow between positions", do)
    acc = config.acc
    through, share = written(config, stream, block.norm_attn_out, "attn")
    w_o = through(block.attn.w_o[...])
    own_stream = stream.resid_pre.astype(acc)
    bias = _output_bias(model, layer)
    # A difference, because a sum over heads and sources would repeat attention's product.
    brought = stream.attn_out - bias
    if config.norms_stream:
        norm: Any = block.norm_attn
        # Either way the stream passes the norm. Attention's output passes it only if the norm
        # comes after the sum. The map goes to w_o, and the scale, which has positions, to share.
        own_stream = norm.linear(own_stream) / stream.norm_attn_scale[..., None]
        if config.norm_placement == "stream_after":
            w_o = norm.linear(w_o)
            share = share / stream.norm_attn_scale
            bias, brought = (
                norm.linear(x) / stream.norm_attn_scale[..., None] for x in (bias, brought)
            )
        bias = bias if norm.b is None else bias + over(norm.b[...].astype(acc), bias)
    # A parallel block has no resid_mid.
    if config.parallel:
        total = stream.resid_pre.astype(acc) + stream.attn_out
    else:
        total = stream.resid_mid.astype(acc)
    repeats = config.heads_per_group
    v = jnp.repeat(stream.v.astype(acc), repeats, -2)
    bias = jnp.where(stream.mask[..., None], bias, 0)
    return Brought(stream.pattern.astype(acc), v, w_o, share, own_stream, total, brought, bias)


def _output_bias(model: Transformer, layer: Layer) -> Float[Array, "B T D"]:
    """The biases in `attn_out`: `b_o` after the norm of the output, and that norm's own bias."""
    stream, b_o, norm = layer.stream, layer.block.attn.b_o, layer.block.norm_attn_out
    acc = model.config.acc
    bias = jnp.zeros(stream.attn_out.shape, acc)
    if b_o is not None:
        through, share = written(model.config, stream, norm, "attn")
        bias = share[..., None] * over(through(b_o[...]), bias)
    if norm is not None and norm.b is not None:
        bias = bias + over(norm.b[...].astype(acc), bias) * model.config.residual_scale
    return jnp.where(stream.mask[..., None], bias, 0)
