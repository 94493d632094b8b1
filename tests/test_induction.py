"""G4: a hand-built two-layer induction model, in which every tool's answer is known exactly."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import (
    ModelConfig,
    Set,
    Transformer,
    decompose,
    feature_attribution,
    logit_attribution,
    residual_gradients,
    residual_movement,
    run,
)

V, P, BETA = 9, 19, 60.0
N = 7
TOK, POS, PREV, OUT, ONE = 0, V, V + P, 2 * V + P, 3 * V + P
D, K = 3 * V + P + 1, max(V, P) + 1


def induction_model() -> Transformer:
    """Layer 0 attends to the previous token and copies it to `prev`; layer 1 looks there."""
    config = ModelConfig(
        n_layers=2, d_model=D, n_heads=1, n_kv_heads=1, d_head=K, d_mlp=0, vocab_size=V,
        norm=None, norm_eps=None, positions="learned", max_positions=P, dtype="float64",
    )  # fmt: skip
    s = np.sqrt(K)
    w_e, w_pos, w_u = np.zeros((V, D)), np.zeros((P, D)), np.zeros((D, V))
    q, k, v = (np.zeros((2, D, 1, K)) for _ in range(3))
    o = np.zeros((2, 1, K, D))
    tokens, places = np.arange(V), np.arange(P)
    w_e[tokens, TOK + tokens] = 1
    w_e[:, ONE] = 1
    w_pos[places, POS + places] = 1
    q[0, POS + places[1:], 0, places[1:]] = BETA * s
    k[0, POS + places[:-1], 0, places[1:]] = 1
    v[:, TOK + tokens, 0, tokens] = 1
    o[0, 0, tokens[1:], PREV + tokens[1:]] = 1
    q[1, TOK + tokens, 0, tokens] = BETA * s
    k[1, PREV + tokens, 0, tokens] = 1
    o[1, 0, tokens[1:], OUT + tokens[1:]] = 1
    q[1, ONE, 0, K - 1] = BETA * s / 2
    k[1, TOK, 0, K - 1] = 1
    w_u[OUT + tokens, tokens] = 1
    model = Transformer(config, rngs=nnx.Rngs(0))
    attn = model.blocks.attn
    for parameter, value in (
        (model.w_e, w_e), (model.w_pos, w_pos), (model.w_u, w_u),
        (attn.w_q, q), (attn.w_k, k), (attn.w_v, v), (attn.w_o, o),
    ):  # fmt: skip
        parameter[...] = jnp.asarray(value)
    return model


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    once = np.stack([1 + rng.permutation(V - 1)[:N] for _ in range(3)])
    return np.concatenate([np.zeros((3, 1), int), once, once], 1)


SECOND = np.arange(N + 1, 2 * N)  # queries in the second copy whose next token is in the prompt


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
