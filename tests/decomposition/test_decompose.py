"""decompose, residual_decomposition: the terms sum to the stream at every point."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    Capture,
    Label,
    NotCapturedError,
    ResidualTools,
    capture_for,
    decompose,
    logit_attribution,
    residual_decomposition,
    residual_gradients,
    residual_movement,
    resume,
    run,
)
from tests.decomposition.points import points
from tests.models import VARIANTS, WAYS, batch, chosen, close, model


def relative(terms, x):
    """max|sum - x| over the largest sum of absolute terms (the rule for identities)."""
    terms = np.asarray(terms, np.float64)
    return np.abs(terms.sum(0) - np.asarray(x)).max() / np.abs(terms).sum(0).max()


BY = ["component", "head", "neuron", "expert", "source"]


@pytest.mark.parametrize(("variant", "by"), chosen(product(VARIANTS, BY), WAYS))
def test_terms_sum_to_every_stream_point(variant, by):
    m = model(variant)
    if by == "expert" and not m.config.n_experts:
        with pytest.raises(ValueError, match="`by` must be one of .* got 'expert'"):
            decompose(m, np.arange(6)[None], by=by)
        return
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    every = list(points(out.residuals, m.config.n_layers))
    for at, x in every[:: {"llama": 1, "mixed": 2}.get(variant, 4)]:
        parts = decompose(m, out, at=at, by=by)
        assert parts.terms.shape == (len(parts.labels), *x.shape)
        assert relative(parts.terms, x) < 1e-6, at
    assert not np.asarray(parts.terms)[:, ~mask].any()


@pytest.mark.parametrize("by", ["component", "head", "neuron", "source"])
@pytest.mark.parametrize(
    "variant",
    chosen(["llama3", "gpt2", "both", "stream_after", "stream_before", "mixed"], ["both"]),
)
def test_terms_sum_in_float64(variant, by, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    assert out.logits.dtype == out.residuals.norm_attn_scale.dtype == np.float64
    every = list(points(out.residuals, 3))
    for at, x in every if variant == "both" else every[::4]:
        assert relative(decompose(m, out, at=at, by=by).terms, x) < 1e-12


@pytest.mark.parametrize("by", chosen(["component", "head"], ["head"]))
@pytest.mark.parametrize("variant", chosen(["llama3", "gpt2", "attention_only"], ["gpt2"]))
def test_the_rounding_of_a_bfloat16_stream_is_a_term(variant, by):
    """With it the terms sum as in float32; without it they do not (METHOD of the rounding term)."""
    m = model(variant, stream_dtype="bfloat16")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    assert out.residuals.resid_mid.dtype == out.residuals.final.dtype == jnp.bfloat16
    assert out.residuals.attn_out.dtype == jnp.float32
    every = list(points(out.residuals, 3))
    for at, x in every[::3]:
        parts = decompose(m, out, at=at, by=by)
        assert relative(parts.terms, x.astype(jnp.float32)) < 1e-6, at
    kept = np.array([i for i, label in enumerate(parts.labels) if "rounding" not in label.kind])
    assert relative(parts.terms[kept], x.astype(jnp.float32)) > 1e-4
    again = decompose(m, tokens, mask=mask, at=at, by=by).terms
    np.testing.assert_allclose(again, parts.terms, atol=0.05)
    for found in (
        logit_attribution(m, tokens, 3, by=by, mask=mask),
        logit_attribution(m, out, 3, by=by),
    ):
        assert found.gap.max() < 1e-5
    plain = run(model(variant), tokens, mask=mask).logits
    close(out.logits, plain, 5e-2)
    moved = residual_movement(m, out, 0, -1)
    assert moved.angle.dtype == jnp.float32
    gradient = residual_gradients(m, tokens, 3, mask=mask).resid_pre
    close(gradient, residual_gradients(model(variant), tokens, 3, mask=mask).resid_pre, 0.2)
    start = resume(m, out.residuals.resid_pre[1], 1, mask=mask)
    close(start.logits, out.logits, 1e-2)


def test_a_dropped_bias_would_be_seen():
    m = model("gpt2")
    out = run(m, np.arange(6)[None], capture="all")
    parts = decompose(m, out, by="head")
    without = [i for i, label in enumerate(parts.labels) if label.kind != "attn_bias"]
    assert relative(parts.terms[np.array(without)], out.residuals.final) > 1e-2


def test_terms_are_what_their_labels_say():
    m = model("gpt2")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    r = out.residuals
    parts = decompose(m, out, by="component")
    assert list(parts.labels)[:4] == [
        Label(None, "embed"), Label(None, "pos"), Label(0, "attn"), Label(0, "mlp"),
    ]  # fmt: skip
    embedded = np.where(mask[..., None], m.w_e[...][np.where(mask, tokens, 0)], 0)
    close(parts.terms[0], embedded, 1e-6)
    for label, term in zip(parts.labels, parts.terms, strict=True):
        if label.layer is not None:
            field = {"attn": r.attn_out, "mlp": r.mlp_out}[label.kind]
            np.testing.assert_array_equal(term, field[label.layer])
    heads = decompose(m, out, by="head")
    term = heads.terms[list(heads.labels).index(Label(1, "head", 4))]
    by_hand = np.asarray(r.z[1, :, :, 4]) @ np.asarray(m.blocks.attn.w_o[...][1, 4])
    close(term, by_hand, 1e-5)
    assert len(heads.labels) == 2 + 3 * (6 + 1 + 1)
    assert heads.labels[-1] == Label(2, "mlp") and heads.labels[1:3][1] == Label(0, "head", 0)
    with pytest.raises(IndexError, match="must be in .* got 26"):
        heads.labels[26]


def test_a_point_lists_what_is_written_before_it():
    m, tokens = model("gpt2"), np.arange(6)[None]
    written = [(None, "embed"), (None, "pos")]
    for layer in range(3):
        for at, kind in (("resid_pre", "attn"), ("resid_mid", "mlp")):
            labels = decompose(m, tokens, at=(at, layer)).labels
            assert [(label.layer, label.kind) for label in labels] == written
            written.append((layer, kind))


@pytest.mark.parametrize(
    "variant", chosen(["gpt2", "both", "stream_after", "mixed", "gpt_oss"], ["both", "gpt_oss"])
)
def test_projections_and_norms_never_expand_and_equal_the_expanded(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    directions = np.random.default_rng(0).normal(size=(4, 20)).astype(np.float32)
    for by in BY if m.config.n_experts else BY[:3]:
        parts = decompose(m, out, by=by)
        terms = np.asarray(parts.terms)
        close(parts.project(directions), terms @ directions.T, 1e-5)
        close(parts.norms(), np.linalg.norm(terms, axis=-1), 1e-5)
        value, index = parts.top(3)
        norms = np.linalg.norm(terms, axis=-1)
        close(value, -np.sort(-norms, axis=0)[:3], 1e-5)
        close(np.take_along_axis(norms, np.asarray(index), 0), value, 1e-5)
    parts = decompose(m, out, by="head")
    with pytest.raises(ValueError, match=r"`byte_limit` must be at least the \d+ bytes .* got 100"):
        parts.expand(byte_limit=100)
    with pytest.raises(ValueError, match=r"`directions` must be `\[N,20\]`, got shape \(20,\)"):
        parts.project(directions[0])
    with pytest.raises(ValueError, match=r"`k` must be an int in \[1, \d+\], got 99"):
        parts.top(99)


def test_from_tokens_from_a_stream_and_from_a_part_of_it():
    m = model("gpt2")
    tokens, mask, _ = batch()
    whole = decompose(m, run(m, tokens, mask=mask, capture="all"), by="head").terms
    np.testing.assert_allclose(decompose(m, tokens, mask=mask, by="head").terms, whole, atol=1e-5)
    lean = run(m, tokens, mask=mask, capture=capture_for("head"))
    np.testing.assert_allclose(decompose(m, lean, by="head").terms, whole, atol=1e-5)
    some = decompose(m, lean, by="head", positions=(-1, 0)).terms
    few = run(m, tokens, mask=mask, capture=Capture(capture_for("head"), positions=(-1, 0)))
    again = decompose(m, few, by="head").terms
    first = decompose(m, few, by="head", positions=(0,)).terms
    for b in range(5):
        where = np.flatnonzero(mask[b])
        for terms in (some, again):
            np.testing.assert_allclose(terms[:, b, 0], whole[:, b, where[-1]], atol=1e-5)
            np.testing.assert_allclose(terms[:, b, 1], whole[:, b, where[0]], atol=1e-5)
        np.testing.assert_allclose(first[:, b, 0], whole[:, b, where[0]], atol=1e-5)
    chosen = decompose(m, lean, by="head", layers=(-1,))
    assert {label.layer for label in chosen.labels} == {None, 2}
    np.testing.assert_allclose(chosen.terms[2:], whole[-8:], atol=1e-5)
    np.testing.assert_allclose(
        decompose(m, lean, layer=-2, by="head").terms,
        decompose(m, lean, at=("resid_post", 1), by="head").terms,
    )


def test_jit_vmap_and_grad():
    m = model("gpt2")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    whole = decompose(m, out, by="head").norms()
    jitted = jax.jit(lambda m, r: decompose(m, r, by="head").norms())(m, out.residuals)
    close(jitted, whole, 1e-6)
    rows = jax.vmap(
        lambda r: decompose(m, r, by="head").norms(), in_axes=(out.residuals.batch_axes(),)
    )(out.residuals)
    close(np.moveaxis(rows, 0, 1), whole, 1e-6)
    close(decompose(m, out.residuals.example(2), by="head").norms(), whole[:, 2], 1e-6)
    gradient = jax.grad(lambda m: decompose(m, tokens, mask=mask, by="head").norms().sum())(m)
    assert np.isfinite(gradient.w_e[...]).all() and np.abs(gradient.w_e[...]).max() > 0


@pytest.mark.parametrize("variant", chosen(VARIANTS))
def test_residual_decomposition_sums_exactly(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask)
    n = m.config.n_layers
    if m.config.norms_stream:
        with pytest.raises(ValueError, match="must be the plain sum .* got .*; use decompose"):
            residual_decomposition(out, 0)
    for layer in range(-n, n):
        d = ResidualTools(m).residual_decomposition(out, layer)
        total = d.from_prev + d.from_attn + d.from_mlp + d.from_norm
        if m.config.norms_stream:
            close(total, out.residuals.resid_post[layer], 1e-6)
            assert (np.abs(np.asarray(d.from_norm)).max() > 0.1) == (m.config.norm == "layernorm")
            assert not np.asarray(total)[~mask].any()
            continue
        np.testing.assert_array_equal(d.from_prev, out.residuals.resid_pre[layer])
        # Two units in the last place where the last operation of a write is fused with the sum.
        fused = variant in ("post", "both", "post_layernorm", "scaled", "mixed", "mixed_more")
        ulp = 2**-22 * np.abs(np.asarray(total)).max() if fused else 0
        np.testing.assert_allclose(total, out.residuals.resid_post[layer], rtol=0, atol=ulp)


def test_residual_decomposition_takes_a_traced_layer_and_a_single_example():
    m = model()
    tokens, mask, _ = batch()
    r = run(m, tokens, mask=mask).residuals
    all_layers = jax.vmap(lambda i: residual_decomposition(r, i).from_mlp)(jnp.arange(-3, 0))
    np.testing.assert_array_equal(all_layers, r.mlp_out)
    one = jax.vmap(lambda e: residual_decomposition(e, 1).from_attn, (r.batch_axes(),))(r)
    np.testing.assert_array_equal(one, r.attn_out[1])
    part = run(m, tokens, mask=mask, capture=Capture(("resid_pre", "attn_out", "mlp_out"), (1,)))
    np.testing.assert_array_equal(residual_decomposition(part, 1).from_attn, r.attn_out[1])
    np.testing.assert_array_equal(residual_decomposition(part, np.int64(1)).from_mlp, r.mlp_out[1])
    for layer in (0, -1):
        with pytest.raises(
            NotCapturedError, match="`layer_idx` must be one of the layers captured"
        ):
            residual_decomposition(part, layer)
    with pytest.raises(TypeError, match="`layer_idx` must be an integer, got True"):
        residual_decomposition(part, True)


def test_a_field_that_was_not_captured_is_not_taken_for_one_that_is_not_there():
    tokens = np.arange(5)[None]
    some = run(model(), tokens, capture=("resid_pre", "attn_out", "final"))
    with pytest.raises(NotCapturedError, match=r"must be captured with \['mlp_out'\]"):
        residual_decomposition(some, 1)
    without = run(model("attention_only"), tokens, capture=("resid_pre", "attn_out", "final"))
    assert not residual_decomposition(without, 1).from_mlp.any()
    assert {"mlp_out", "mlp_act", "norm_mlp_scale"} < set(without.residuals.lacks)


def test_bad_input():
    m = model()
    out = run(m, np.arange(4)[None])
    for call, error, message in [
        (lambda: residual_decomposition(out, 3), IndexError, r"must be in \[-3, 3\), got 3"),
        (lambda: residual_decomposition(out, -4), IndexError, r"must be in \[-3, 3\), got -4"),
        (lambda: residual_decomposition(out, 1.0), TypeError, "must be an integer, got 1.0"),
        (lambda: residual_decomposition([[1]], 0), TypeError, "must be a ResidualStream .* got"),
        (lambda: decompose(m, out, by="neurone"), ValueError, "`by` must be one of .* got"),
        (lambda: decompose(m, out, at="start"), ValueError, "`at` must be 'final' or .* got"),
        (lambda: decompose(m, out, layer=3), IndexError, r"must be in \[-3, 3\), got 3"),
        (lambda: decompose(m, out, layers=(5,)), IndexError, r"must be in \[-3, 3\), got 5"),
        (lambda: decompose(m, out, by="head"), NotCapturedError, r"must be captured with \['z'\]"),
        (lambda: decompose(m, out, layers=1), TypeError, "`layers` must be a tuple of integers"),
        (lambda: decompose(m, out, positions=(1.7,)), TypeError, "`positions` must be a tuple of"),
        (lambda: decompose(m, out, positions=(9,)), IndexError, r"must be in \[-4, 4\), got 9"),
        (lambda: decompose(m, out, mask=[[1, 1, 1, 0]]), ValueError, "`mask` must be the stream's"),
        (
            lambda: decompose(m, out).top(1.5),
            ValueError,
            r"`k` must be an int in \[1, 7\], got 1.5",
        ),
        (lambda: decompose(m, out).labels.where("zz"), ValueError, "`kind` must be one of .* got"),
        (lambda: capture_for("x"), ValueError, "`by` must be one of .* got 'x'"),
    ]:
        with pytest.raises(error, match=message):
            call()


def test_neurons_and_experts_are_what_their_labels_say():
    """By hand, from the weights: every expert and shared neuron of one layer, and their biases."""
    m = model("mixed")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    r, moe = out.residuals, m.segments[1].moe
    routing = r.routing[1]
    e, f, u = 5, 11, 10
    neurons = decompose(m, out, by="neuron")
    labels = list(neurons.labels)
    assert len(labels) == 1 + 3 + 28 + 2 * (e * f + u)
    terms, experts = np.asarray(neurons.terms), decompose(m, out, by="expert")
    by_expert = dict(zip(experts.labels, np.asarray(experts.terms), strict=True))
    assert {label.kind for label in experts.labels if label.layer == 0} == {"attn", "mlp"}
    act, index, weight = (np.asarray(x[1]) for x in (r.mlp_act[1], routing.index, routing.weight))
    for expert in range(e):
        used = np.where(index == expert, weight, 0)
        for unit in (0, 3, f - 1):
            term = terms[labels.index(Label(2, "neuron", expert * f + unit))]
            value = (used * act[..., unit]).sum(-1)
            close(term, value[..., None] * np.asarray(moe.w_out[...][1, expert, unit]), 1e-5)
        first = labels.index(Label(2, "neuron", expert * f))
        close(by_expert[Label(2, "expert", expert)], terms[first : first + f].sum(0), 1e-5)
    assert repr(experts.labels) == (
        "Labels(17 terms: embed, in layers 0: attn + mlp, "
        "in layers 1-2: attn + 5 expert + shared_expert)"
    )
    shared = np.asarray(r.shared_act[1][1] * routing.shared[1][..., None])
    last = terms[labels.index(Label(2, "neuron", e * f + u - 1))]
    close(last, shared[..., -1:] * np.asarray(moe.shared.w_out[...][1, -1]), 1e-5)
    close(by_expert[Label(2, "shared_expert")], shared @ np.asarray(moe.shared.w_out[...][1]), 1e-5)
    assert not routing.weight[:, ~mask].any() and (routing.weight[:, mask] > 0).all()
