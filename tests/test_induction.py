"""G4: a hand-built two-layer induction model, in which every tool's answer is known exactly."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import (
    Set,
    Transformer,
    decompose,
    feature_attribution,
    logit_attribution,
    residual_gradients,
    residual_movement,
    run,
)
from tests.induction import (
    ONE,
    OUT,
    POS,
    PREV,
    SECOND,
    TOK,
    D,
    N,
    P,
    V,
    induction_model,
    induction_tokens,
)


@pytest.fixture
def tokens():
    return induction_tokens()


def test_patterns_and_logits(x64, tokens):
    m = induction_model()
    out = run(m, tokens, capture="all")
    a0, a1 = np.asarray(out.residuals.pattern)[:, :, 0]
    queries = np.arange(1, 2 * N + 1)
    np.testing.assert_allclose(a0[:, queries, queries - 1], 1, atol=1e-12)
    second = np.arange(N + 1, 2 * N + 1)
    np.testing.assert_allclose(a1[:, second, second - N + 1], 1, atol=1e-12)
    following = np.eye(V)[tokens[:, second - N + 1]]
    np.testing.assert_allclose(out.logits[:, second], following, atol=1e-12)
    np.testing.assert_allclose(out.logits[:, 1 : N + 1], 0, atol=1e-12)
    assert not np.allclose(a0[:, second, second - N + 1], 1, atol=0.5)


def test_ablating_layer_0_silences_the_model(x64, tokens):
    m = induction_model()
    logits = run(m, tokens, edits=Set("z", 0.0, layer=0)).logits
    np.testing.assert_allclose(logits, 0, atol=1e-12)


@pytest.mark.parametrize("by", ["component", "head"])
def test_all_of_the_logit_is_written_by_layer_1(x64, tokens, by):
    m = induction_model()
    for position in SECOND:
        found = logit_attribution(m, tokens, tokens[:, position + 1], by=by, position=position)
        for label, term in zip(found.labels, found.terms, strict=True):
            np.testing.assert_allclose(term, float(label.layer == 1), atol=1e-12)
        np.testing.assert_allclose(found.constant, 0, atol=1e-12)
        np.testing.assert_allclose(found.logit, 1, atol=1e-12)


def test_writes_lie_in_their_blocks(x64, tokens):
    parts = decompose(induction_model(), tokens, by="head")
    axes = np.eye(D)
    inside = {"embed": TOK, "pos": POS}
    for label, energy in zip(parts.labels, np.asarray(parts.project(axes)), strict=True):
        start = inside.get(label.kind, PREV if label.layer == 0 else OUT)
        own = np.zeros(D, bool)
        own[start : start + (P if start == POS else V)] = True
        own[ONE] = label.kind == "embed"
        np.testing.assert_allclose(energy[..., ~own], 0, atol=1e-12)
        assert np.abs(energy[..., own]).max() > 0.5


def test_movement_is_known(x64, tokens):
    """Layer 1 adds one unit vector to a stream of norm 2 (token, one, position, previous)."""
    found = residual_movement(induction_model(), tokens, 0, 1)
    np.testing.assert_allclose(found.relative_norm[:, SECOND], 0.5, atol=1e-12)
    np.testing.assert_allclose(found.angle[:, SECOND], np.arctan(0.5), atol=1e-12)


def test_attribution_finds_the_copied_token_and_a_saturated_softmax_hides_the_rest(x64, tokens):
    """The documented failure of gradients: the effect of the layer 0 head is 1, its gradient 0."""
    m, position = induction_model(), 2 * N - 1
    targets = tokens[:, position + 1]
    found = feature_attribution(m, tokens, targets, position=position)
    source = position - N + 1
    np.testing.assert_allclose(found.tokens[:, source], 1, atol=1e-9)
    np.testing.assert_allclose(np.delete(found.tokens, source, 1), 0, atol=1e-9)
    gradient = residual_gradients(m, tokens, targets, position=position, capture=("z",)).z
    assert np.abs(gradient[0]).max() < 1e-9


def test_in_float32(tokens):
    import jax

    with jax.enable_x64(True):
        m64 = induction_model()
    config = m64.config.__class__(**{**vars(m64.config), "dtype": "float32"})
    m = Transformer(config, rngs=nnx.Rngs(0))
    leaves = [jnp.asarray(np.asarray(leaf), jnp.float32) for leaf in jax.tree.leaves(m64)]
    m = jax.tree.unflatten(jax.tree.structure(m), leaves)
    second = np.arange(N + 1, 2 * N + 1)
    following = np.eye(V)[tokens[:, second - N + 1]]
    np.testing.assert_allclose(run(m, tokens).logits[:, second], following, atol=1e-6)
