"""By source: which earlier position's value, through which head."""

import jax
import numpy as np
import pytest

from arrakis_jax import (
    Capture,
    Label,
    NotCapturedError,
    capture_for,
    decompose,
    logit_attribution,
    run,
)
from tests.models import KINDS, batch, chosen, close, model

SHAPES = ["llama3", "gpt2", "both", "post_layernorm", "parallel", "stream_after", "stream_before",
          "mixed", "gpt_oss"]  # fmt: skip


def by_hand(m, r, layer):
    """`pattern[t,s] v_s w_o`, literally, `[H,S,B,T,D]`, in a model that writes without a norm."""
    v = np.repeat(np.asarray(r.v[layer]), m.config.n_heads // m.config.n_kv_heads, 2)
    w_o = np.asarray(m.blocks.attn.w_o[...][layer])
    return np.einsum("BHTS,BSHK,HKD->HSBTD", r.pattern[layer], v, w_o)


@pytest.mark.parametrize(
    "variant", chosen(["llama3", "gpt2", "parallel", "gpt_oss", "nope"], ["gpt2", "gpt_oss"])
)
def test_against_the_literal_products(variant, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    r = out.residuals
    parts = decompose(m, out, by="source")
    directions = np.random.default_rng(0).normal(size=(3, 20))
    u = np.asarray(m.unembedding(np.array(3))) * np.asarray(m.norm_final.w[...])
    u = u - u.mean() if m.config.norm == "layernorm" else u
    found = logit_attribution(m, tokens, 3, by="source", position=None, mask=mask)
    for layer in range(3):
        expected = by_hand(m, r, layer)
        start = list(parts.labels).index(Label(layer, "head", 0, 0))
        own = slice(start, start + 6 * 11)
        flat = expected.reshape(66, *expected.shape[2:])
        close(parts.terms[own], flat, 1e-12)
        close(parts.norms()[own], np.linalg.norm(flat, axis=-1), 1e-12)
        close(parts.project(directions)[own], flat @ directions.T, 1e-12)
        close(found.by_source()[layer], expected @ u / np.asarray(r.norm_final_scale), 1e-11)
    assert parts.labels[start + 2 * 11 + 5] == Label(2, "head", 2, 5)
    assert str(parts.labels[start + 2 * 11 + 5]) == "L2 head 2 @ 5"


@pytest.mark.parametrize("variant", chosen(SHAPES, ["both", "stream_after"]))
def test_sources_sum_to_heads_heads_and_bias_to_the_layer_all_to_the_logit(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    for position in (-1, None):
        about = dict(mask=mask, position=position)
        sources, heads, parts = (
            logit_attribution(m, tokens, 7, by=by, **about)
            for by in ("source", "head", "component")
        )
        scale = np.abs(parts.terms).sum(0).max()
        for found in (sources, heads, parts):
            assert found.gap.max() < 1e-5
        gap = np.abs(sources.by_source().sum(2) - heads.by_head()).max()
        assert gap <= 1e-5 * scale
        np.testing.assert_array_equal(sources.by_head(), sources.by_source().sum(2))
        kinds = {k.name for segment in heads.labels.segments for k in segment.kinds}
        if not m.config.norms_stream:
            layer = heads.by_head().sum(1)
            for kind in {"attn_bias", "norm_bias"} & kinds:
                bias = heads.by_layer(kind)
                layer = layer + (bias if kind == "attn_bias" else bias[:, 0])
            assert np.abs(layer - parts.by_layer("attn")).max() <= 1e-5 * scale


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_padded_equals_one_by_one_and_sources_are_columns(side, x64):
    m = model("gpt2", dtype="float64")
    tokens, mask, prompts = batch(side=side, lengths=(7, 7, 4, 1))
    for position in (-1, 0, None):
        found = logit_attribution(m, tokens, 5, by="source", position=position, mask=mask)
        for b, prompt in enumerate(prompts):
            alone = logit_attribution(m, prompt[None], 5, by="source", position=position)
            row, single = found.by_source()[:, :, :, b], alone.by_source()[:, :, :, 0]
            assert not np.asarray(row)[:, :, ~mask[b]].any()
            row = row[:, :, mask[b]]
            np.testing.assert_allclose(row if position is not None else row[..., mask[b]], single,
                                       atol=1e-10)  # fmt: skip


def test_positions_and_captured_streams():
    m = model("both")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture=capture_for("source"))
    every = decompose(m, out, by="source")
    one = decompose(m, tokens, mask=mask, by="source", positions=(-1, 0))
    assert one.terms.shape == (len(every.labels), 5, 2, 20)
    for b in range(5):
        last = np.flatnonzero(mask[b])[-1]
        close(one.terms[:, b, 0], every.terms[:, b, last], 1e-5)
    again = decompose(m, out, by="source", positions=(-1, 0))
    close(again.terms, one.terms, 1e-5)
    logit = logit_attribution(m, tokens, 3, by="source", mask=mask)
    close(logit_attribution(m, out, 3, by="source").terms, logit.terms, 1e-5)
    some = run(m, tokens, mask=mask, capture=Capture(capture_for("source"), positions=(-1,)))
    for call in (
        lambda: decompose(m, some, by="source"),
        lambda: logit_attribution(m, some, 3, by="source"),
    ):
        with pytest.raises(NotCapturedError, match="must be captured at all positions"):
            call()
    picked = run(m, tokens, mask=mask, capture="all").residuals
    with pytest.raises(ValueError, match="ask for by='source'"):
        logit_attribution(m, picked, 3, by="head").by_source()


def test_examples_and_vmap():
    m = model("gpt2")
    tokens, mask, _ = batch()
    r = run(m, tokens, mask=mask, capture="all").residuals
    plain = logit_attribution(m, r, 3, by="source").terms
    rows = jax.vmap(lambda e: logit_attribution(m, e, 3, by="source").terms, (r.batch_axes(),))(r)
    close(rows.T, plain, 1e-5)


# Of each kind of block, and of each shape of segments and of terms that may lack.
SELECTED = (*KINDS, "attention_only", "one_layer", "stream_before", "moe", "mixed_more")


@pytest.mark.parametrize("variant", chosen(SELECTED, ["gpt2", "both", "mixed"]))
def test_selected_terms_are_those_of_all(variant):
    """Layers and kinds are selected before anything is computed; the rest is what they leave."""
    m = model(variant)
    tokens, mask, _ = batch()
    n = m.config.n_layers
    for by, kinds in (("head", ("head",)), ("neuron", ("neuron", "embed")), ("source", None)):
        if not (m.config.d_mlp or m.config.n_experts) and by == "neuron":
            continue
        every = logit_attribution(m, tokens, 3, by=by, mask=mask)
        for layers in (None, (n - 1,)):
            some = logit_attribution(m, tokens, 3, by=by, kinds=kinds, layers=layers, mask=mask)
            wanted = [
                i for i, label in enumerate(every.labels)
                if (kinds is None or label.kind in kinds)
                and (layers is None or label.layer in (None, *layers))
            ]  # fmt: skip
            assert list(some.labels) == [every.labels[i] for i in wanted]
            scale = np.abs(every.terms).sum(0).max()
            np.testing.assert_allclose(some.terms, every.terms[np.array(wanted)], atol=1e-5 * scale)
            left = every.logit - every.constant - some.terms.sum(0)
            np.testing.assert_allclose(some.rest, left, atol=1e-5 * scale)
            complete = kinds is None and layers is None
            assert np.isnan(some.gap).all() != complete


def test_kinds_are_checked():
    m = model()
    for kinds, error, message in [
        ("head", TypeError, "`kinds` must be a tuple of names, got 'head'"),
        (("heads",), ValueError, r"`kinds` must be made of \('embed', .* got \['heads'\]"),
        ((), ValueError, "`kinds` must be made of"),
        (("attn",), ValueError, r"must be kinds of terms that there are, got \['attn'\]"),
        (3, TypeError, "`kinds` must be a tuple of names, got 3"),
        (("attn_bias", "head"), ValueError, r"that there are, got \['attn_bias'\]"),
    ]:
        for call in (decompose, lambda *a, **k: logit_attribution(*a, 3, **k)):
            with pytest.raises(error, match=message):
                call(m, np.arange(4)[None], by="head", kinds=kinds)
