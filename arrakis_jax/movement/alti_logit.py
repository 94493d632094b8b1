"""The logits that attention and MLPs bring, attributed to the input's tokens through ALTI."""

from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float, over
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.source import over_layers
from arrakis_jax.frozen.attention import BROUGHT_FIELDS, Brought, attention_brought
from arrakis_jax.frozen.reads import LayerReader, StreamReader, logit_direction, logit_reader
from arrakis_jax.movement.contributions import alti, identity, normalised, on_diagonal, weights_of
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.stream.residuals import ResidualStream


def logit_flow(
    model: Transformer,
    source: Array | ResidualStream,
    mask: Array | None,
    real: Bool[Array, "B T"],
    targets: Array,
    against: Array | None,
    complete: bool,
    layers: bool,
) -> dict[str, Any]:
    """The fields of an InformationFlow, for each position's own target."""
    config = model.config
    u, bias = logit_reader(model, targets, against)
    r, offset = logit_direction(model, u)
    reader = StreamReader.of(model, r)
    size = reader.size

    def step(state: tuple, layer: Layer) -> tuple[tuple, dict[str, Array]]:
        flow, empty, logits, constant = state
        brought = attention_brought(model, layer)
        at = reader.at(layer)
        q_BTS = _attention_logits(brought, at.mid)
        own, total = normalised(alti(brought))
        after = contract("BTN,BNS->BTS", own, flow)
        logits = logits * at.attn[..., None] + contract("BTN,BNS->BTS", q_BTS, flow)
        constant = constant * at.attn + (brought.bias * at.mid).sum(-1)
        constant = constant + (q_BTS * _lost(flow)[:, None]).sum(-1)
        logits, constant = logits * at.mlp[..., None], constant * at.mlp
        if complete and layer.stream.mlp_out is not None:
            m_BT, bias_BT = _mlp_logits(model, layer, at)
            rows = flow if config.parallel else after  # of what the MLP reads
            logits = logits + m_BT[..., None] * rows
            constant = constant + bias_BT + m_BT * _lost(rows)
        found = {"q": q_BTS, "passed": at.attn * at.mlp, "mlp": at.mlp} if layers else {}
        return (after, empty | ((total == 0) & real), logits, constant), found

    fields = BROUGHT_FIELDS if model.norm_final is None else (*BROUGHT_FIELDS, "norm_final_scale")
    fields = (*fields, "norm_mlp_scale") if config.norms_stream else fields
    fields = (*fields, "embed", "mlp_out") if complete else fields
    flow = identity(real, config.acc)
    logits, constant = jnp.zeros_like(flow), jnp.zeros(real.shape, config.acc)
    if complete:
        logits = on_diagonal(logits, _embedded(model, source, mask, reader.first))
    start = (flow, jnp.zeros(real.shape, bool), logits, constant)
    passed = over_layers(model, source, mask, fields, start, step)
    _, empty, logits, constant = passed.state
    scale = jnp.ones_like(size) if model.norm_final is None else passed.stream.norm_final_scale
    logits = jnp.where(real[..., None], logits * (size / scale)[..., None], 0)
    constant = jnp.where(real, constant * size / scale + offset + bias, 0)
    result = {"tokens": logits, "empty": empty}
    if layers:
        found = passed.stacked
        later = jax.lax.cumprod(found["passed"], axis=0, reverse=True)
        later = jnp.concatenate([later[1:], jnp.ones_like(later[:1])])
        factor = found["mlp"] * later * over(jnp.where(real, size / scale, 0), later)
        result["layers"] = found["q"] * factor[..., None]
    return result | ({"constant": constant} if complete else {})


def _embedded(
    model: Transformer, source: Array | ResidualStream, mask: Array | None, r: Array
) -> Float[Array, "B T"]:
    """What the embedding of each position reads along `r`."""
    if isinstance(source, ResidualStream):
        source.need("embed")
        return _along(source.embed, r)
    return _along(model.embed(source, mask=mask), r)


def _attention_logits(brought: Brought, r: Float[Array, "B T D"]) -> Float[Array, "B T S"]:
    """`sum_h a[h,t,s] v[s,h] w_o[h] . r[t]`."""
    w_BTHK = contract("HKD,BTD->BTHK", brought.w_o, r)
    read_BHTS = contract("BTHK,BSHK->BHTS", w_BTHK, brought.v)
    return (weights_of(brought) * read_BHTS).sum(1)


def _mlp_logits(model: Transformer, layer: Layer, at: LayerReader) -> tuple[Array, Array]:
    """What the MLP brings, and the bias of a norm of the stream."""
    out_BTD = layer.stream.mlp_out.astype(model.config.acc)
    stream_norm: Norm | None = layer.block.norm_mlp if model.config.norms_stream else None
    bias_BT = jnp.zeros_like(at.mlp)
    if stream_norm is not None and stream_norm.b is not None:
        bias_BT = _along(over(stream_norm.b[...].astype(out_BTD.dtype), out_BTD), at.post)
    if model.config.norm_placement == "stream_after":
        return _along(out_BTD, at.mid) * at.mlp, bias_BT
    return _along(out_BTD, at.post), bias_BT


def _along(x: Float[Array, "B T D"], r: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    return (x.astype(r.dtype) * r).sum(-1)


def _lost(flow: Float[Array, "B T S"]) -> Float[Array, "B T"]:
    """What of each position does not come from any token: all where nothing contributed."""
    return 1 - flow.sum(-1)
