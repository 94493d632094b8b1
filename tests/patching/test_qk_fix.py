"""The fix for queries and keys, against patches themselves: softmax is not taken to first order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Logit, Replace, Set, residual_gradients, run
from arrakis_jax.patching.attribution_patching import attribution_patching
from arrakis_jax.patching.qk_fix import of_keys
from tests.induction import SECOND, N, V, induction_model
from tests.models import close, model
from tests.patching.cells import ALL, TARGET, exact, pair_of

LINEAR = dict(n_layers=1, d_mlp=0, norm=None, norm_eps=None, gated=False, activation="identity")
# The cap, sinks, a window shorter than the prompts.
ATTENTION = dict(sinks=True, attention_softcap=2.0, window=3, window_layers=(True,))


def test_one_layer_of_attention_is_patched_exactly(x64):
    """G6: the target is linear in the pattern and the values; grouped heads, padding, RoPE."""
    m = model("llama", dtype="float64", **LINEAR, **ATTENTION)
    clean, corrupt, mask = pair_of((6, 3))
    source = run(m, corrupt, mask=mask, capture=ALL).residuals
    sites = ("q", "k", "v")
    how = dict(sites=sites, mask=mask)
    found = attribution_patching(m, clean, corrupt, TARGET, method="atp_star", **how)
    plain = attribution_patching(m, clean, corrupt, TARGET, **how)
    zero = attribution_patching(m, clean, None, TARGET, method="atp_star", patch="zero", **how)
    for site in sites:
        value = getattr(source, site)
        wanted = exact(m, clean, mask, value, site=site)
        close(found.effects[site], wanted, 1e-10, site)
        close(zero.effects[site], exact(m, clean, mask, 0 * value, site=site), 1e-10, site)
        error = np.abs(plain.effects[site] - wanted).max() / np.abs(wanted).max()
        assert (error < 1e-10) if site == "v" else (error > 0.01)


@pytest.mark.exhaustive
def test_it_is_the_slope_at_z_times_the_change_of_z(x64):
    """Of the patched run, in every layer of any model."""
    m = model("gpt_oss", dtype="float64", attention_softcap=2.0)
    clean, corrupt, mask = pair_of((6, 3))
    found = attribution_patching(
        m, clean, corrupt, TARGET, sites=("q", "k"), mask=mask, method="atp_star"
    )
    base, source = (run(m, t, mask=mask, capture=ALL).residuals for t in (clean, corrupt))
    slope = residual_gradients(m, clean, 3, against=4, mask=mask, capture=("z",)).z
    for site in ("q", "k"):
        value = getattr(source, site)

        @jax.jit
        def change(layer, head, position, site=site, value=value):
            edit = Replace(site, value, layer=layer, head=head, position=position)
            z = m(jnp.asarray(clean), mask=mask, capture=("z",), edits=(edit,)).residuals.z
            return (slope * (z - base.z))[layer].sum((1, 2, 3))

        for layer, position, head in ((0, 0, 2), (1, 2, 0), (2, 1, 1), (2, 5, 2)):
            columns = [np.flatnonzero(row)[min(position, row.sum() - 1)] for row in mask]
            effects = np.asarray(found.effects[site])[layer, columns, head, np.arange(2)]
            there = position < mask.sum(-1)
            close(effects[there], change(layer, head, position)[there], 1e-10, site)


def test_a_saturated_softmax(x64):
    """G4: where the gradient of layer 0 is zero and the effect -1, a key of layer 1 tells."""
    m, rng = induction_model(), np.random.default_rng(0)
    once = 1 + rng.permutation(V - 1)[:N]
    tokens = np.concatenate([[0], once, once])[None]
    query = int(SECOND[-1])
    target = Logit(tokens[:, query + 1], position=query)
    ablated = attribution_patching(
        m, tokens, None, target, sites="z", over="layer", patch="zero", base="clean"
    )
    logits = run(m, tokens, edits=Set("z", 0.0, layer=0)).logits
    np.testing.assert_allclose(logits[0, query, tokens[0, query + 1]] - ablated.base, -1, atol=1e-9)
    np.testing.assert_allclose(ablated.effects[0], 0, atol=1e-9)
    corrupt = tokens.copy()
    corrupt[0, query - N] = np.setdiff1d(np.arange(1, V), once)[0]  # the one that is not there
    for patch in ("resample", "zero"):
        found = attribution_patching(
            m, tokens, corrupt, target, sites=("q", "k"), method="atp_star", patch=patch
        )
        np.testing.assert_allclose(found.effects["k"][1, query - N + 1], -1, atol=1e-9)
    plain = attribution_patching(m, tokens, corrupt, target, sites="k")
    np.testing.assert_allclose(plain.effects, 0, atol=1e-9)


def test_keys_in_saturated_rows():
    """Float32 with scores around 80 against the definition in float64; masked and single keys."""
    rng, n = np.random.default_rng(0), 9
    scores = rng.normal(size=(40, n)).astype(np.float32) * np.linspace(1, 80, 40)[:, None]
    scores = scores.astype(np.float32)
    change = (rng.normal(size=scores.shape) * np.linspace(0.1, 80, 40)[:, None]).astype(np.float32)
    g = rng.normal(size=scores.shape).astype(np.float32)
    allowed = np.tril(np.ones((n, n), bool))[np.arange(40) % n]
    scores[~allowed], change[~allowed] = np.finfo(np.float32).min, 0
    found = of_keys(jnp.asarray(scores), jnp.asarray(change), jnp.asarray(g))

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    wide = np.where(allowed, scores, -np.inf).astype(np.float64)
    wanted = np.zeros(scores.shape)
    for s in range(n):
        patched = wide.copy()
        patched[:, s] += change[:, s]
        wanted[:, s] = (g * (softmax(patched) - softmax(wide))).sum(-1)
    assert np.abs(np.asarray(found) - wanted).max() <= 2e-6 < 0.5 < np.abs(wanted).max()
    assert not np.asarray(found)[::n].any()  # rows with one key
