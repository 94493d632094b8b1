"""logit_attribution: the terms and the constant are the model's own logit."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    Capture,
    NotCapturedError,
    Scale,
    capture_for,
    decompose,
    logit_attribution,
    run,
)
from arrakis_jax.frozen.reads import logit_direction
from tests.models import VARIANTS, WAYS, batch, chosen, close, compilations, model

TARGETS, AGAINST = np.array([3, 30, 0, 7, 7]), np.array([4, 2, 9, 1, 30])


BY = ("component", "head", "neuron", "expert", "source")


def last(values, mask):
    return np.stack([v[np.flatnonzero(m)[-1]] for v, m in zip(values, mask, strict=True)])


@pytest.mark.parametrize(("variant", "by"), chosen(product(VARIANTS, BY), WAYS))
def test_terms_sum_to_the_models_own_logit(variant, by):
    m = model(variant)
    tokens, mask, _ = batch()
    if by == "expert" and not m.config.n_experts:
        with pytest.raises(ValueError, match="`by` must be one of .* got 'expert'"):
            logit_attribution(m, tokens, TARGETS, by=by, mask=mask)
        return
    out = run(m, tokens, mask=mask, capture=("logits", *capture_for(by)))
    found = logit_attribution(m, out, TARGETS, by=by)
    assert found.gap.max() < 1e-5
    row = last(np.asarray(out.logits, np.float64), mask)
    if (cap := m.config.logit_softcap) is not None:
        row = cap * np.arctanh(row / cap)
    scale = np.abs(row).max()
    np.testing.assert_allclose(found.logit, row[range(5), TARGETS], atol=1e-5 * scale)
    np.testing.assert_allclose(found.terms.sum(0) + found.constant, found.logit, atol=1e-5 * scale)
    pair = logit_attribution(m, tokens, TARGETS, against=AGAINST, by=by, mask=mask)
    assert pair.gap.max() < 1e-5
    expected = row[range(5), TARGETS] - row[range(5), AGAINST]
    np.testing.assert_allclose(pair.logit, expected, atol=2e-5 * scale)


@pytest.mark.parametrize("variant", chosen(["llama3", "gpt2", "unembed_bias"], ["unembed_bias"]))
def test_every_position_in_float64(variant, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    targets = np.random.default_rng(0).integers(31, size=tokens.shape)
    logits = np.asarray(run(m, tokens, mask=mask).logits)
    for by in ("component", "head", "source"):
        found = logit_attribution(m, tokens, targets, by=by, mask=mask, position=None)
        assert found.gap.max() < 1e-12
        own = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
        np.testing.assert_allclose(found.terms.sum(0) + found.constant, own, atol=1e-12)
        assert not np.asarray(found.terms)[:, ~mask].any() and not found.logit[~mask].any()


@pytest.mark.parametrize("drop", ["centring", "gain", "bias"])
def test_each_part_of_the_norm_is_needed(drop, monkeypatch):
    """Mutations: without centring, gain or bias the terms no longer sum to the logit."""
    from arrakis_jax.terms import scan as reading

    def broken(model, u):
        norm = model.norm_final
        gained = u if drop == "gain" else u * norm.w[...][None, None]
        offset = 0 * u[..., 0] if drop == "bias" else u @ norm.b[...]
        return (gained if drop == "centring" else norm.centre(gained)), offset

    monkeypatch.setattr(reading, "logit_direction", broken)
    m = model("gpt2", vocab_size=37)
    tokens, mask, _ = batch(vocab=37)
    assert logit_attribution(m, tokens, TARGETS, mask=mask).gap.max() > 1e-3


def test_both_contraction_orders_agree(x64):
    """G3: projecting W_O first equals expanding the heads first."""
    m = model("gpt2", dtype="float64")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    r = out.residuals
    found = logit_attribution(m, out, TARGETS, by="head").by_head()
    writes = np.einsum("LBTHK,LHKD->LHBTD", r.z, m.blocks.attn.w_o[...])
    u = np.asarray(m.unembedding(TARGETS)) * np.asarray(m.norm_final.w[...])
    direction = u - u.mean(-1, keepdims=True)
    scores = np.einsum("LHBTD,BD->LHBT", writes, direction) / np.asarray(r.norm_final_scale)
    for b in range(5):
        where = np.flatnonzero(mask[b])[-1]
        close(found[:, :, b], scores[:, :, b, where], 1e-12)


@pytest.mark.parametrize(
    ("variant", "by"),
    chosen(product(["llama3", "both", "parallel", "stream_after", "mixed", "moe"], BY[1:]), WAYS),
)
def test_both_orders_agree_in_every_shape(variant, by, x64):
    """G3 for grouped heads, norms on writes, parallel blocks and experts: expanded, then read."""
    m = model(variant, dtype="float64")
    if by == "expert" and not m.config.n_experts:
        pytest.skip("no experts")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    u = m.unembedding(jnp.asarray(TARGETS))[:, None]
    r, _ = logit_direction(m, u)
    scale = 1.0 if m.norm_final is None else out.residuals.norm_final_scale[..., None]
    expanded = (decompose(m, out, by=by).terms * (r / scale)[None]).sum(-1)
    found = logit_attribution(m, tokens, TARGETS, by=by, mask=mask).terms
    for b in range(5):
        where = np.flatnonzero(mask[b])[-1]
        close(found[:, b], expanded[:, b, where], 1e-11)


def test_heads_and_bias_sum_to_their_attention():
    m = model("gpt2")
    tokens, mask, _ = batch()
    heads = logit_attribution(m, tokens, 3, by="head", mask=mask)
    parts = logit_attribution(m, tokens, 3, by="component", mask=mask)
    assert heads.by_head().shape == (3, 6, 5)
    close(heads.by_head().sum(1) + heads.by_layer("attn_bias"), parts.by_layer("attn"), 1e-5)
    close(heads.by_layer("mlp"), parts.by_layer("mlp"), 1e-5)
    value, index = heads.top(4)
    assert value.shape == (4, 5)
    close(np.take_along_axis(np.asarray(heads.terms), np.asarray(index), 0), value, 1e-6)
    with pytest.raises(ValueError, match="`kind` must be one of .* got 'head'"):
        parts.by_head()


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("position", [-1, 0, None])
def test_padded_equals_one_by_one(side, position, x64):
    m = model("gpt2", dtype="float64")
    tokens, mask, prompts = batch(side=side, lengths=(7, 7, 4, 4, 1))
    found = logit_attribution(m, tokens, TARGETS if position is not None else 5, by="head",
                              against=8, position=position, mask=mask)  # fmt: skip
    for b, prompt in enumerate(prompts):
        target = TARGETS[b] if position is not None else 5
        alone = logit_attribution(
            m, prompt[None], int(target), against=8, by="head", position=position
        )
        row = found.terms[:, b] if position is not None else found.terms[:, b, mask[b]]
        np.testing.assert_allclose(row, alone.terms[:, 0], atol=1e-10)


def test_one_position_has_the_terms_that_it_has_among_all(x64):
    """Also the embedding's and the position's, whose sum would hide a mistake in either."""
    m = model("gpt2", dtype="float64")
    tokens, mask, _ = batch()
    every = logit_attribution(m, tokens, 3, position=None, mask=mask).terms
    for position in (-1, 0):
        found = logit_attribution(m, tokens, 3, position=position, mask=mask).terms
        columns = [np.flatnonzero(row)[position] for row in mask]
        close(found, every[:, np.arange(5), np.array(columns)], 1e-12)


def test_a_captured_stream_is_not_run_again():
    m = model("gpt2")
    tokens, mask, _ = batch()
    fresh = logit_attribution(m, tokens, TARGETS, by="head", mask=mask)
    out = run(m, tokens, mask=mask, capture=capture_for("head"))
    for source in (out, out.residuals):
        close(logit_attribution(m, source, TARGETS, by="head").terms, fresh.terms, 1e-5)
    one = run(m, tokens, mask=mask, capture=Capture(capture_for("head"), positions=(-1,)))
    close(logit_attribution(m, one, TARGETS, by="head").terms, fresh.terms, 1e-5)
    for last in (np.int64(-1), jnp.int32(-1), np.full(5, -1)):
        again = logit_attribution(m, one, TARGETS, by="head", position=last)
        close(again.terms, fresh.terms, 1e-5)
    traced = jax.jit(lambda p: logit_attribution(m, one, TARGETS, by="head", position=p).terms)
    for wrong in (0, np.array([-1, -1, -1, 0, -1])):
        with pytest.raises(NotCapturedError, match="`position` must be one of those captured"):
            logit_attribution(m, one, TARGETS, by="head", position=wrong)
    with pytest.raises(NotCapturedError, match="got a traced one"):
        traced(-1)
    with pytest.raises(NotCapturedError, match=r"must be captured with \['z'\]"):
        logit_attribution(m, run(m, tokens, mask=mask), TARGETS, by="head")


def test_an_edit_that_breaks_the_sum_is_reported():
    m = model()
    edited = run(m, np.arange(6)[None], edits=Scale("resid_mid", 0.5, layer=1))
    assert logit_attribution(m, edited, 3).gap.max() > 1e-3


def test_jit_vmap_scan_and_grad():
    m = model("gpt2")
    tokens, mask, _ = batch()
    plain = logit_attribution(m, tokens, TARGETS, by="head", mask=mask).terms
    jitted = jax.jit(lambda m, t, k: logit_attribution(m, t, TARGETS, by="head", mask=k).terms)
    close(jitted(m, tokens, mask), plain, 1e-5)
    each = jnp.asarray(tokens)[:, None], jnp.asarray(mask)[:, None], jnp.asarray(TARGETS)[:, None]

    def one(tokens, mask, target):
        return logit_attribution(m, tokens, target, by="head", mask=mask).terms[:, 0]

    close(jax.vmap(one)(*each).T, plain, 1e-5)
    close(jax.lax.scan(lambda c, x: (c, one(*x)), 0, each)[1].T, plain, 1e-5)
    r = run(m, tokens, mask=mask, capture="all").residuals
    rows = jax.vmap(lambda e, t: logit_attribution(m, e, t, by="head").terms, (r.batch_axes(), 0))(
        r, jnp.asarray(TARGETS)
    )
    close(rows.T, plain, 1e-5)
    gradient = jax.grad(
        lambda m: logit_attribution(m, tokens, TARGETS, by="head", mask=mask).terms[5].sum()
    )(m)
    assert np.isfinite(gradient.blocks.attn.w_o[...]).all()


@pytest.mark.parametrize("variant", ["gpt2", "unembed_bias", "llama"])
def test_what_cannot_be_checked_is_nan(variant):
    """Traced: an id that is none, and a position that a row does not have."""
    m = model(variant)
    tokens = np.arange(8).reshape(2, 4)
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    logit = jax.jit(lambda t: logit_attribution(m, tokens, t).logit)
    for target in (31, -1, 99):
        assert np.isnan(logit(target)).all()
    assert np.isfinite(logit(30)).all()
    at = jax.jit(lambda p: logit_attribution(m, tokens, 3, position=p, mask=mask))(3)
    assert np.isfinite(at.terms[:, 0]).all() and np.isnan(at.terms[:, 1]).all()
    np.testing.assert_array_equal(np.isnan(at.logit), [False, True])


def test_compiles_once_for_all_targets_and_positions():
    m = model("gpt2")
    tokens, mask, _ = batch()
    logit_attribution(m, tokens, 3, by="head", mask=mask)
    with compilations() as names:
        for target, position in ((5, -1), (TARGETS, 0), (9, np.zeros(5, int))):
            logit_attribution(m, tokens, target, by="head", mask=mask, position=position)
    assert names == []


def test_bad_input():
    m = model("gpt2")
    tokens, mask, _ = batch()

    def call(targets=3, **options):
        return logit_attribution(m, tokens, targets, mask=mask, **options)

    for broken, error, message in [
        (lambda: call(31), ValueError, r"`targets` must be in \[0, 31\), got \[31\]"),
        (lambda: call(-1), ValueError, r"`targets` must be in \[0, 31\), got \[-1\]"),
        (lambda: call(3.0), TypeError, "`targets` must be integer token ids, got dtype float"),
        (lambda: call([1, 2]), ValueError, r"`targets` must be an int or of shape \(5,\), got"),
        (lambda: call(against=99), ValueError, r"`against` must be in \[0, 31\), got \[99\]"),
        (lambda: call(by="expert"), ValueError, "`by` must be one of .* got 'expert'"),
        (lambda: call(position=4), IndexError, r"`position` must be in \[-1, 1\), got \[4"),
        (lambda: call(position=0.5), TypeError, "`position` must be an integer, got dtype"),
        (
            lambda: logit_attribution(m, run(m, tokens, mask=mask), 3, mask=~mask),
            ValueError,
            "`mask` must be the stream's own, or None, got another",
        ),
        (
            lambda: logit_attribution(
                m, run(m, tokens, mask=mask).residuals.example(2), 3, position=4
            ),
            IndexError,
            r"must be in \[-4, 4\), got \[4\]",
        ),
    ]:
        with pytest.raises(error, match=message):
            broken()
