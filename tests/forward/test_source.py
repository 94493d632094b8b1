"""A pass over the layers, running the model or over a captured stream."""

import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Capture, NotCapturedError, run
from arrakis_jax.core.axes import over
from arrakis_jax.forward.source import batch_of, source_of
from arrakis_jax.frozen.attention import BROUGHT_FIELDS, attention_brought
from arrakis_jax.stream.padding import Padding
from tests.models import VARIANTS, batch, chosen, close, model


@pytest.mark.parametrize("variant", chosen(VARIANTS))
def test_what_attention_reads_is_all_that_it_writes(variant, x64):
    """Sources and biases sum to the stream after attention, run or captured."""
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()

    def step(state, layer):
        r = attention_brought(m, layer)
        brought = jnp.einsum("BHTS,BSHK,HKD->BTD", r.pattern, r.v, r.w_o) * r.share[..., None]
        norm, attn = layer.block.norm_attn_out, layer.block.attn
        zero = jnp.zeros_like(brought)
        bias = zero if attn.b_o is None else zero + over(attn.b_o[...], zero)
        if norm is not None:
            bias = norm.linear(bias)
            bias = bias / layer.stream.norm_attn_out_scale[..., None]
            bias = bias if norm.b is None else bias + over(norm.b[...], zero)
        bias = bias * m.config.residual_scale
        if m.config.norms_stream:
            own = layer.block.norm_attn
            if m.config.norm_placement == "stream_after":
                bias = own.linear(bias)
                bias = bias / layer.stream.norm_attn_scale[..., None]
            bias = bias if own.b is None else bias + over(own.b[...], zero)
        total = jnp.where(layer.stream.mask[..., None], brought + r.own + bias, 0)
        return state + 1, (total, r.total, layer.resid_post)

    out = run(m, tokens, mask=mask, capture="all").residuals
    sources = source_of(m, tokens, mask), source_of(m, out)
    walks = [source.over_layers(m, BROUGHT_FIELDS, jnp.zeros(()), step) for source in sources]
    for stream, walked in walks:
        total, expected, post = walked.found
        close(total, expected, 1e-12)
        close(post, out.resid_post, 1e-12)
        close(stream.final, out.final, 1e-12)
        close(stream.embed, out.embed, 1e-12)
        assert walked.state == m.config.n_layers
    assert np.asarray(walks[0][1].found[0])[:, mask].any()


@pytest.mark.parametrize("variant", chosen(VARIANTS))
@pytest.mark.parametrize("layers", [None, (0,), (0, 2)])
def test_a_source_hands_over_the_same_run_or_captured(variant, layers, x64):
    """Some layers and positions, in any kind of model: from tokens and from a stream."""
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    at = (0, -1)
    fields = ("attn_out", "resid_pre")

    def step(state, layer):
        return state + layer.stream.attn_out.sum(), (layer.index, layer.stream.resid_pre)

    out = run(m, tokens, mask=mask, capture="all").residuals
    expected = out.at(at)
    if layers is not None:
        layers = tuple(layer for layer in layers if layer < m.config.n_layers)
    rows = np.arange(m.config.n_layers) if layers is None else np.array(layers)
    for source in (source_of(m, tokens, mask), source_of(m, out)):
        _, walked = source.over_layers(m, fields, jnp.zeros(()), step, layers=layers, at=at)
        index, resid_pre = walked.found
        assert index.tolist() == rows.tolist()
        close(resid_pre, expected.resid_pre[rows], 1e-12)
        close(walked.state, expected.attn_out[rows].sum(), 1e-10)
        close(source.stream(m, fields, at=at).attn_out, expected.attn_out, 1e-12)
        assert (source.ranks(at) == Padding.of(tokens.shape, mask).counted(jnp.array(at))).all()


def test_a_stream_must_hold_what_is_read():
    m = model()
    tokens = jnp.arange(6)[None]

    def step(state, layer):
        return state, None

    with pytest.raises(NotCapturedError, match="'pattern'"):
        source_of(m, run(m, tokens)).over_layers(m, BROUGHT_FIELDS, None, step)
    some = run(m, tokens, capture=Capture(BROUGHT_FIELDS, layers=(0,))).residuals
    with pytest.raises(NotCapturedError, match="all layers"):
        source_of(m, some).over_layers(m, BROUGHT_FIELDS, None, step)
    with pytest.raises(ValueError, match="must be a batch"):
        batch_of(run(m, tokens).residuals.example(0))
