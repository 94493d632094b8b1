"""Tools that read an edited stream: the right value, or a refusal that says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    Add,
    Scale,
    Set,
    attribute_to,
    decompose,
    flow_routes,
    information_flow,
    logit_attribution,
    run,
    top_attribution,
)
from tests.models import batch, chosen, close, model

FAMILIES = ("post", "both", "stream_after", "stream_before", "mixed", "gpt_oss", "parallel")


def edited(variant, *edits, **changes):
    m = model(variant, **changes)
    tokens, mask, _ = batch()
    return m, run(m, tokens, mask=mask, capture="all", edits=edits)


def test_the_stream_names_the_sites_that_edits_changed():
    m, out = edited("llama", Set("z", 0.0, layer=1), Add("resid_post", 1.0))
    assert out.residuals.edited == ("resid_post", "z")
    tokens = np.arange(4)[None]

    def custom(site, layer, value):
        return value * 2 if site == "v" else value

    assert run(m, tokens, edits=custom).residuals.edited == ("v",)
    assert run(m, tokens).residuals.edited == ()
    scales = jnp.arange(3.0)
    swept = jax.vmap(lambda s: m(tokens, edits=(Scale("mlp_out", s),)).residuals)(scales)
    assert swept.edited == ("mlp_out",)


@pytest.mark.parametrize("variant", chosen(FAMILIES, ("stream_after", "gpt_oss")))
def test_what_z_is_made_of_may_be_edited(variant, x64):
    edits = (Scale("pattern", 0.5, layer=0), Add("v", 0.3, layer=1), Scale("k", 1.5))
    m, out = edited(variant, *edits, dtype="float64")
    parts = decompose(m, out, by="source")
    close(parts.terms.sum(0), out.residuals.final, 1e-6)
    found = logit_attribution(m, out, 3, by="source")
    assert found.gap.max() < 1e-6
    heads = logit_attribution(m, out, 3, by="head")
    close(found.by_head(), heads.by_head(), 1e-6)


@pytest.mark.parametrize("variant", chosen(FAMILIES, ("parallel",)))
def test_terms_by_source_of_an_edited_z_are_refused(variant):
    m, out = edited(variant, Set("z", 0.0, layer=2, head=1))
    heads = logit_attribution(m, out, 3, by="head")
    assert not np.asarray(heads.by_head()[2, 1]).any() and heads.gap.max() < 1e-5
    message = "`residuals` must be of a forward without edits of z for by='source', got one with"
    for tool in (
        lambda: decompose(m, out, by="source"),
        lambda: logit_attribution(m, out, 3, by="source"),
        lambda: top_attribution(m, out, 3, 2, by="source"),
        lambda: attribute_to(m, out, jnp.ones(m.config.d_model), by="source"),
    ):
        with pytest.raises(ValueError, match=message):
            tool()


@pytest.mark.parametrize("site", ["z", "attn_out", "resid_mid"])
def test_flow_of_what_an_edit_replaced_is_refused(site):
    m, out = edited("both", Scale(site, 0.5, layer=1))
    for method in ("attention", "rollout"):
        assert np.isfinite(information_flow(m, out, method=method).tokens).all()
    message = f"without edits of {site} for flow between positions, got one with edits of {site}"
    for method in ("value_weighted", "mixing", "alti"):
        with pytest.raises(ValueError, match=message):
            information_flow(m, out, method=method)
    for method in ("alti_logit", "alti_logit_complete"):
        with pytest.raises(ValueError, match=message):
            information_flow(m, out, 3, method=method)
    with pytest.raises(ValueError, match=message):
        flow_routes(m, out)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "final"])
def test_logits_from_tokens_of_an_edited_stream_are_refused(site):
    m, out = edited("llama", Add(site, 1.0))
    for method in ("alti_logit", "alti_logit_complete"):
        with pytest.raises(ValueError, match=f"without edits of {site} for ALTI-Logit"):
            information_flow(m, out, 3, method=method)


@pytest.mark.parametrize("variant", chosen(["llama", "gpt2"], ["gpt2"]))
def test_an_edited_scale_of_the_final_norm(variant, x64):
    m, out = edited(variant, Scale("norm_final_scale", 2.0), dtype="float64")
    found = logit_attribution(m, out, 3, by="component")
    last = jnp.take_along_axis(
        out.logits[..., 3], jnp.argmax(jnp.cumsum(out.residuals.mask, 1), 1)[:, None], 1
    )[:, 0]
    close(found.logit, last, 1e-6)
    assert found.gap.max() < 1e-6
