"""The logits that attention and MLPs bring, attributed to the input's tokens through ALTI."""

from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.source import Source
from arrakis_jax.frozen.attention import BROUGHT_FIELDS, Brought, attention_brought
from arrakis_jax.frozen.reads import LayerReader, StreamReader, logit_direction, logit_reader
from arrakis_jax.movement.contributions import alti, identity, normalised, on_diagonal, weights_of
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Layer, Transformer


def logit_flow(
    model: Transformer,
    source: Source,
    targets: Int[Array, "B T"],
    against: Int[Array, "B T"] | None,
    complete: bool,
    layers: bool,
) -> dict[str, Any]:
    """The fields of an InformationFlow, for each position's own target.

    One walk goes on with the flow from the input, the logits so far, and what no token brings. On
    passing a norm of the stream, everything brought so far is multiplied by one factor.
    """
    config, real = model.config, source.padding.real
    u, bias = logit_reader(model, targets, against)
    r, offset = logit_direction(model, u)
    reader = StreamReader.of(model, r)
    size = reader.size

    def step(state: tuple, layer: Layer) -> tuple[tuple, dict[str, Array]]:
        flow, empty, logits, constant = state
        brought = attention_brought(model, layer)
        at = reader.at(layer)
        q_BTS = _attention_logits(brought, at.mid)
        rows, total = normalised(alti(brought))
        after = contract("BTN,BNS->BTS", rows, flow)
        # What was brought before passes this layer's norm. What attention brings from a position is
        # shared among the tokens of that position's mixture.
        logits = logits * at.attn[..., None] + contract("BTN,BNS->BTS", q_BTS, flow)
        constant = constant * at.attn + (brought.bias * at.mid).sum(-1)
        # A mixture whose tokens do not sum to 1 leaves a rest, which keeps the sum exact.
        constant = constant + (q_BTS * _lost(flow)[:, None]).sum(-1)
        logits, constant = logits * at.mlp[..., None], constant * at.mlp
        if complete and layer.stream.mlp_out is not None:
            m_BT, bias_BT = _mlp_logits(model, layer, at)
            mixture = flow if config.parallel else after  # the tokens in what the MLP reads
            logits = logits + m_BT[..., None] * mixture
            constant = constant + bias_BT + m_BT * _lost(mixture)
        facts = {"q": q_BTS, "passed": at.attn * at.mlp, "mlp": at.mlp} if layers else {}
        return (after, empty | ((total == 0) & real), logits, constant), facts

    # Fields that a captured stream need not have are asked for only where they are read.
    fields = BROUGHT_FIELDS if model.norm_final is None else (*BROUGHT_FIELDS, "norm_final_scale")
    fields = (*fields, "norm_mlp_scale") if config.norms_stream else fields
    fields = (*fields, "embed", "mlp_out") if complete else fields
    flow = identity(real, config.acc)
    logits, constant = jnp.zeros_like(flow), jnp.zeros(real.shape, config.acc)
    if complete:
        logits = on_diagonal(logits, _along(_embedded(model, source), reader.first))
    start = (flow, jnp.zeros(real.shape, bool), logits, constant)
    if source.captured is not None:
        do = "use logit_attribution, whose `rest` holds such an edit"
        source.captured.need_unedited(("resid_pre", "resid_post", "final"), "ALTI-Logit", do)
    stream, walked = source.over_layers(model, fields, start, step)
    _, empty, logits, constant = walked.state
    # The final scale, and the length that directions leave out, come in once for all layers.
    scale = jnp.ones_like(size) if model.norm_final is None else stream.norm_final_scale
    share = jnp.where(real, size / scale, 0)
    logits = jnp.where(real[..., None], logits * (size / scale)[..., None], 0)
    result = {"tokens": logits, "empty": empty}
    if complete:
        result["constant"] = jnp.where(real, constant * size / scale + offset + bias, 0)
    if layers:
        result["layers"] = _layer_logits(walked.found, share)
    return result


def _layer_logits(facts: dict[str, Array], share: Float[Array, "B T"]) -> Float[Array, "L B T S"]:
    """The logits that each layer's attention brings, times what later norms multiply them by."""
    later = jax.lax.cumprod(facts["passed"], axis=0, reverse=True)
    # The norms after a layer, not its own: the product from the next layer on.
    later = jnp.concatenate([later[1:], jnp.ones_like(later[:1])])
    return facts["q"] * (facts["mlp"] * later * over(share, later))[..., None]


def _embedded(model: Transformer, source: Source) -> Float[Array, "B T D"]:
    """What the walk begins with, which it hands over only at its end."""
    if source.tokens is None:
        return source.stream(model, ("embed",)).embed
    return model.embed(source.tokens, mask=source.mask)


def _attention_logits(brought: Brought, r: Float[Array, "B T D"]) -> Float[Array, "B T S"]:
    """`sum_h a[h,t,s] v[s,h] w_o[h] . r[t]`."""
    # W_O meets the direction first: no head's vectors of width D are formed.
    w_BTHK = contract("HKD,BTD->BTHK", brought.w_o, r)
    read_BHTS = contract("BTHK,BSHK->BHTS", w_BTHK, brought.v)
    return (weights_of(brought) * read_BHTS).sum(1)


def _mlp_logits(model: Transformer, layer: Layer, at: LayerReader) -> tuple[Array, Array]:
    """The logits that the MLP brings, and those of the bias of a norm of the stream."""
    out_BTD = layer.stream.mlp_out.astype(model.config.acc)
    stream_norm: Norm | None = layer.block.norm_mlp if model.config.norms_stream else None
    bias_BT = jnp.zeros_like(at.mlp)
    if stream_norm is not None and stream_norm.b is not None:
        bias_BT = _along(over(stream_norm.b[...].astype(out_BTD.dtype), out_BTD), at.post)
    # With the norm after the sum, the MLP's output passes it, as the stream does.
    if model.config.norm_placement == "stream_after":
        return _along(out_BTD, at.mid) * at.mlp, bias_BT
    return _along(out_BTD, at.post), bias_BT


def _along(x: Float[Array, "B T D"], r: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    return (x.astype(r.dtype) * r).sum(-1)


def _lost(flow: Float[Array, "B T S"]) -> Float[Array, "B T"]:
    """The share of each position that comes from no token: all where nothing contributed."""
    return 1 - flow.sum(-1)
