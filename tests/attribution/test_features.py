"""feature_attribution: definitions, completeness, exact cases, and the stopping rule."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import feature_attribution, run
from arrakis_jax.attribution.features import DOUBLINGS, METHODS, TOLERANCE
from tests.models import batch, close, compilations, model

LINEAR = dict(
    norm=None, norm_eps=None, activation="identity", gated=False, d_mlp=28, positions=None,
    rope_theta=None,
)  # fmt: skip


def frozen(m):
    """Uniform attention: queries of zero."""
    m.blocks.attn.w_q[...] = jnp.zeros_like(m.blocks.attn.w_q[...])
    return m


@pytest.mark.parametrize(
    "variant", ["llama3", "gpt2", "no_norm", "both", "parallel", "stream_before", "scaled", "mixed"]
)
def test_saliency_and_grad_x_input_by_definition(variant, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch(lengths=(5, 3))
    last = [np.flatnonzero(row)[-1] for row in mask]
    ids = jnp.where(jnp.asarray(mask), jnp.asarray(tokens), 0)
    embedding = m.embed_tokens(ids) * mask[..., None]
    positions = m.embed(jnp.asarray(tokens), mask=mask) - embedding

    def total(e):
        logits = m.after_embedding(e + positions, mask=mask).logits
        return (logits[jnp.arange(2), jnp.array(last), 3]).sum()

    gradient = jax.grad(total)(embedding)
    saliency = feature_attribution(m, tokens, 3, method="saliency", mask=mask)
    close(saliency.tokens, jnp.linalg.norm(gradient, axis=-1), 1e-12)
    product = feature_attribution(m, tokens, 3, mask=mask)
    # Measured by their parts: their sum all but vanishes where a norm reads the embedding alone.
    parts = np.asarray(gradient * embedding)
    rounding = 1e-12 * np.abs(parts).sum(-1).max()
    assert np.abs(np.asarray(product.tokens) - parts.sum(-1)).max() <= rounding
    out = run(m, tokens, mask=mask)
    close(product.target, out.logits[np.arange(2), last, 3], 1e-12)
    n = m.config.n_layers
    assert product.layers.shape == saliency.layers.shape == (n + 1, *mask.shape)
    final = jax.grad(
        lambda x: m.readout(x, mask=mask).logits[jnp.arange(2), jnp.array(last), 3].sum()
    )(out.residuals.final)
    # All but zero with LayerNorm, which no scale of its input changes: measured by its parts.
    parts = np.asarray(final * out.residuals.final)
    error = np.abs(np.asarray(product.layers[-1]) - parts.sum(-1)).max()
    assert error <= 1e-12 * np.abs(parts).sum(-1).max()
    if m.w_pos is None:
        assert np.abs(np.asarray(product.layers[0] - product.tokens)).max() <= rounding


def test_linear_network_integrated_gradients_are_grad_x_input(x64):
    """G8: for any number of nodes, with a zero baseline."""
    m = frozen(model(**LINEAR, dtype="float64"))
    tokens, mask, _ = batch()
    zero = np.zeros(20)
    product = feature_attribution(m, tokens, 3, against=5, mask=mask)
    for steps in (1, 2, 7):
        path = feature_attribution(
            m, tokens, 3, against=5, mask=mask, method="integrated_gradients", steps=steps,
            baseline=zero,
        )  # fmt: skip
        close(path.tokens, product.tokens, 1e-12)
        assert path.gap.max() < 1e-12
    close(path.tokens.sum(-1), path.target, 1e-12)


def test_bilinear_gate_needs_one_node(x64):
    """G9: a quadratic path is integrated exactly by the midpoint, a sixth degree by three nodes."""
    one = frozen(model("bilinear", n_layers=1, norm=None, norm_eps=None, dtype="float64"))
    tokens, mask, _ = batch()
    path = dict(method="integrated_gradients", mask=mask)
    assert feature_attribution(one, tokens, 3, steps=1, **path).gap.max() < 1e-12
    two = frozen(model("bilinear", n_layers=2, norm=None, norm_eps=None, dtype="float64"))
    assert feature_attribution(two, tokens, 3, steps=1, **path).gap.max() > 1e-6
    assert feature_attribution(two, tokens, 3, steps=2, **path).gap.max() < 1e-12


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_integrated_gradients_against_the_sum_written_out(variant, x64):
    m = model(variant, dtype="float64")
    tokens = np.arange(5)[None]
    steps = 6
    found = feature_attribution(m, tokens, 3, method="integrated_gradients", steps=steps)
    e = m.embed_tokens(jnp.asarray(tokens))
    positions = m.embed(jnp.asarray(tokens)) - e
    base = jnp.broadcast_to(m.w_e[...].mean(0), e.shape)

    def logit(x):
        return m.after_embedding(x + positions).logits[0, -1, 3]

    node, weight = np.polynomial.legendre.leggauss(steps)
    gradients = [jax.grad(logit)(base + (1 + k) / 2 * (e - base)) for k in node]
    mean = sum(w / 2 * g for w, g in zip(weight, gradients, strict=True))
    expected = ((e - base) * mean).sum(-1)
    close(found.tokens, expected, 1e-12)
    delta = expected.sum() - (logit(e) - logit(base))
    close(found.delta[0], delta, 1e-9)
    close(found.gap[0], abs(delta) / np.abs(expected).sum(), 1e-9)


def test_the_gap_falls_with_steps_and_stops_small(x64):
    m = model("llama", dtype="float64")
    tokens, mask, _ = batch()
    path = dict(method="integrated_gradients", mask=mask)
    gaps = [feature_attribution(m, tokens, 3, steps=n, **path).gap.max() for n in (4, 64, 512)]
    assert gaps[2] < gaps[1] < gaps[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = feature_attribution(m, tokens, 3, **path)
    assert set(np.asarray(found.steps)) <= set(DOUBLINGS)
    for b, steps in enumerate(np.asarray(found.steps)):
        fixed = feature_attribution(m, tokens, 3, steps=int(steps), **path)
        close(found.tokens[b], fixed.tokens[b], 1e-10)
        assert found.gap[b] <= TOLERANCE or steps == DOUBLINGS[-1]
        if steps > DOUBLINGS[0]:
            fewer = feature_attribution(m, tokens, 3, steps=int(steps) // 2, **path)
            assert fewer.gap[b] > TOLERANCE


def test_a_row_that_stays_open_is_named():
    m = model("llama", norm_eps=1e-12)
    m.w_e[...] = m.w_e[...] - m.w_e[...].mean(0, keepdims=True)  # the baseline: a zero stream
    with pytest.warns(UserWarning, match=r"leave a gap above 0.001 in rows \[.*1"):
        feature_attribution(m, np.arange(8).reshape(2, 4), 3, method="integrated_gradients")


def test_a_zero_baseline_is_warned_of_where_it_is_singular():
    m = model("llama")
    path = dict(method="integrated_gradients", steps=4, baseline=np.zeros(20))
    with pytest.warns(UserWarning, match="zero baseline in a model with RMSNorm"):
        feature_attribution(m, np.arange(4)[None], 3, **path)
    feature_attribution(model("gpt2"), np.arange(4)[None], 3, **path)


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("method", METHODS)
def test_padded_equals_one_by_one(method, side, x64):
    m = model("gpt2", dtype="float64")
    tokens, mask, prompts = batch(side=side)
    targets = np.array([3, 30, 0, 7, 7])
    options = dict(method=method, against=1)
    found = feature_attribution(m, tokens, targets, mask=mask, **options)
    for b, prompt in enumerate(prompts):
        alone = feature_attribution(m, prompt[None], targets[b], **options)
        np.testing.assert_allclose(found.tokens[b, mask[b]], alone.tokens[0], atol=1e-10)
        np.testing.assert_allclose(found.target[b], alone.target[0], atol=1e-10)
        if found.layers is not None:
            np.testing.assert_allclose(found.layers[:, b, mask[b]], alone.layers[:, 0], atol=1e-10)
        else:
            assert found.steps[b] == alone.steps[0]
    assert not np.asarray(found.tokens)[~mask].any()


@pytest.mark.parametrize("method", METHODS)
def test_jit_vmap_scan_and_one_compilation(method):
    m = model("gpt2")
    tokens, mask, _ = batch()
    options = dict(method=method)
    plain = feature_attribution(m, tokens, 3, mask=mask, **options)
    jitted = jax.jit(lambda m, t, k: feature_attribution(m, t, 3, mask=k, **options))
    close(jitted(m, tokens, mask).tokens, plain.tokens, 1e-4)
    each = jnp.asarray(tokens)[:, None], jnp.asarray(mask)[:, None]

    def one(t, k):
        return feature_attribution(m, t, 3, mask=k, **options).tokens[0]

    close(jax.vmap(one)(*each), plain.tokens, 1e-4)
    close(jax.lax.scan(lambda c, x: (c, one(*x)), 0, each)[1], plain.tokens, 1e-4)
    with compilations() as names:
        feature_attribution(m, tokens, np.arange(5), mask=mask, position=0, **options)
    assert names == []


def test_the_result_can_be_differentiated():
    m = model("gpt2")
    for options in (dict(), dict(method="integrated_gradients", steps=4)):
        gradient = jax.grad(
            lambda m, o=options: feature_attribution(m, np.arange(5)[None], 3, **o).tokens[0, 2]
        )(m)
        assert np.isfinite(gradient.w_e[...]).all() and np.abs(gradient.w_e[...]).max() > 0


def test_bad_input():
    m = model("gpt2")
    tokens = np.arange(4)[None]

    def call(ids=tokens, target=3, **options):
        return feature_attribution(m, ids, target, **options)

    for broken, error, message in [
        (lambda: call(method="lime"), ValueError, "`method` must be one of .* got 'lime'"),
        (lambda: call(target=31), ValueError, r"`target_ids` must be in \[0, 31\), got \[31\]"),
        (lambda: call(steps=4), ValueError, "`steps` must be None with method='grad_x_input', got"),
        (
            lambda: call(method="integrated_gradients", steps=0),
            ValueError,
            "`steps` must be a positive int or None, got 0",
        ),
        (
            lambda: call(method="integrated_gradients", baseline=np.zeros(3)),
            ValueError,
            r"`baseline` must be of shape \(20,\).* got shape \(3,\)",
        ),
        (lambda: call(ids=tokens + 0.5), TypeError, "`input_ids` must be integers, got dtype"),
        (lambda: call(ids=tokens[0]), ValueError, "`input_ids` must be .* of rank 2, got shape"),
    ]:
        with pytest.raises(error, match=message):
            broken()
