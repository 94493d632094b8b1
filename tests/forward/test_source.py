"""A pass over the layers, running the model or over a captured stream."""

import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Capture, NotCapturedError, run
from arrakis_jax.core.axes import over
from arrakis_jax.forward.source import batch_of, over_layers
from arrakis_jax.frozen.attention import BROUGHT_FIELDS, attention_brought
from tests.models import VARIANTS, batch, close, model


@pytest.mark.parametrize("variant", VARIANTS)
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
            bias = norm.gained(norm.centre(bias))
            bias = bias / layer.stream.norm_attn_out_scale[..., None]
            bias = bias if norm.b is None else bias + over(norm.b[...], zero)
        bias = bias * m.config.residual_scale
        if m.config.norms_stream:
            own = layer.block.norm_attn
            if m.config.norm_placement == "stream_after":
                bias = own.gained(own.centre(bias))
                bias = bias / layer.stream.norm_attn_scale[..., None]
            bias = bias if own.b is None else bias + over(own.b[...], zero)
        total = jnp.where(layer.stream.mask[..., None], brought + r.own + bias, 0)
        return state + 1, (total, r.total, layer.resid_post)

    ran = over_layers(
        m, jnp.asarray(tokens), jnp.asarray(mask), BROUGHT_FIELDS, jnp.zeros(()), step
    )
    out = run(m, tokens, mask=mask, capture="all").residuals
    again = over_layers(m, out, None, BROUGHT_FIELDS, jnp.zeros(()), step)
    for passed in (ran, again):
        total, expected, post = passed.stacked
        close(total, expected, 1e-12)
        close(post, out.resid_post, 1e-12)
        close(passed.stream.final, out.final, 1e-12)
        close(passed.stream.embed, out.embed, 1e-12)
        assert passed.state == m.config.n_layers
    assert np.asarray(ran.stacked[0])[:, mask].any()


def test_a_stream_must_hold_what_is_read():
    m = model()
    tokens = jnp.arange(6)[None]

    def step(state, layer):
        return state, None

    with pytest.raises(NotCapturedError, match="'pattern'"):
        over_layers(m, run(m, tokens).residuals, None, BROUGHT_FIELDS, None, step)
    some = run(m, tokens, capture=Capture(BROUGHT_FIELDS, layers=(0,))).residuals
    with pytest.raises(NotCapturedError, match="all layers"):
        over_layers(m, some, None, BROUGHT_FIELDS, None, step)
    with pytest.raises(ValueError, match="must be a batch"):
        batch_of(run(m, tokens).residuals.example(0))
