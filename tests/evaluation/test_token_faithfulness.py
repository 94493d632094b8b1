"""Deletion and insertion, token by token, and random controls that no batch changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Entropy, Logit, feature_attribution, token_faithfulness
from tests.models import batch, close, compilations, model


def test_every_curve_by_taking_tokens_away_one_at_a_time(x64):
    m = model("gpt2", dtype="float64")
    tokens, mask, prompts = batch(lengths=(5, 3))
    scores = np.random.default_rng(1).normal(size=tokens.shape)
    goal = Logit(3, 4)
    found = token_faithfulness(m, tokens, scores, goal, mask=mask, draws=2)
    mean = m.mean_embedding()
    for b, prompt in enumerate(prompts):
        own = scores[b, mask[b]]
        positions = m.embed(jnp.asarray(prompt)[None])[0] - m.embed_tokens(jnp.asarray(prompt))

        def value(gone, prompt=prompt, positions=positions):
            e = m.embed_tokens(jnp.asarray(prompt))
            e = jnp.where(np.isin(np.arange(len(prompt)), gone)[:, None], mean, e) + positions
            logits = m.after_embedding(e[None]).logits[0, -1]
            return logits[3] - logits[4]

        order = 1 + np.argsort(-own[1:])  # the first token stays
        n = len(order)
        deletion = [value(order[:k]) for k in range(n + 1)]
        insertion = [value(order[k:]) for k in range(n + 1)]
        back = [value(order[n - k :]) for k in range(n + 1)]
        close(found.found.deletion[: n + 1, b], deletion, 1e-11)
        close(found.found.insertion[: n + 1, b], insertion, 1e-11)
        close(found.reversed.deletion[: n + 1, b], back, 1e-11)
        full, empty = deletion[0], deletion[-1]
        np.testing.assert_allclose([found.full[b], found.empty[b]], [full, empty], rtol=1e-11)
        close(found.found.deletion_auc[b], np.trapezoid(deletion, dx=1 / n), 1e-9)
        close(found.found.insertion_auc[b], np.trapezoid(insertion, dx=1 / n), 1e-9)
        share = (np.array(deletion) - empty) / (full - empty)
        close(found.normalised(found.found.deletion)[: n + 1, b], share, 1e-9)
        ks = [int(np.ceil(q * n)) for q in (0.01, 0.05, 0.1, 0.2, 0.5)]
        close(found.found.comprehensiveness[b], np.mean([full - deletion[k] for k in ks]), 1e-9)
        close(found.found.sufficiency[b], np.mean([full - insertion[k] for k in ks]), 1e-9)
        assert found.n_tokens[b] == n
        # Every random order is followed by its reverse.
        close(
            found.random.deletion[1, n - np.arange(n + 1), b],
            found.random.insertion[0, : n + 1, b], 1e-11,
        )  # fmt: skip


@pytest.mark.parametrize("side", ["left", "holes"])
def test_padded_equals_one_by_one(side, x64):
    m = model("llama", dtype="float64")
    tokens, mask, prompts = batch(side=side, lengths=(5, 3, 6))
    scores = np.random.default_rng(1).normal(size=tokens.shape)
    found = token_faithfulness(m, tokens, scores, 3, mask=mask, draws=2)
    for b, prompt in enumerate(prompts):
        alone = token_faithfulness(m, prompt[None], scores[b, mask[b]][None], 3, draws=2)
        for kind in ("found", "reversed", "random"):
            for name, value in vars(getattr(alone, kind)).items():
                padded = getattr(getattr(found, kind), name)[..., b]
                value = value[..., 0]
                if name in ("deletion", "insertion"):
                    padded = padded[..., : value.shape[-1]]
                np.testing.assert_allclose(padded, value, atol=1e-10, err_msg=f"{kind} {name}")


def test_the_batch_of_forwards_and_new_targets():
    m = model("gpt2")
    tokens, mask, _ = batch(lengths=(5, 3))
    scores = np.random.default_rng(1).normal(size=tokens.shape)
    one = token_faithfulness(m, tokens, scores, Logit(3), mask=mask, draws=2)
    many = token_faithfulness(m, tokens, scores, Logit(3), mask=mask, draws=2, step_batch=5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)
    with compilations() as names:
        token_faithfulness(m, tokens, scores, Logit(5), mask=mask, draws=2, seed=7)
    assert names == []
    whole = token_faithfulness(m, tokens, scores, Entropy(), mask=mask, draws=2, first=True)
    np.testing.assert_array_equal(whole.n_tokens, [5, 3])
    four = token_faithfulness(m, tokens, scores, Logit(3), mask=mask, draws=4).random.deletion
    assert not np.allclose(four[0], four[2]) and np.allclose(four[:2], one.random.deletion)


def test_a_score_may_be_infinite():
    m, tokens = model("gpt2"), np.arange(5)[None]
    scores = np.array([[0, 1, -np.inf, 3, 2]])
    found = token_faithfulness(m, tokens, scores, 3, draws=2)
    finite = token_faithfulness(m, tokens, np.maximum(scores, -99), 3, draws=2)
    np.testing.assert_array_equal(found.found.deletion, finite.found.deletion)
    np.testing.assert_array_equal(found.found.insertion[-1], found.full)


def test_bad_input():
    m, tokens = model("gpt2"), np.arange(4)[None]
    with pytest.raises(TypeError, match="`scores` must be an array of numbers, got Attribution"):
        token_faithfulness(m, tokens, feature_attribution(m, tokens, 3), 3)
    for call, message in [
        (lambda: token_faithfulness(m, tokens, np.zeros((1, 3)), 3), "`scores` must be of the tok"),
        (lambda: token_faithfulness(m, tokens, np.zeros((1, 4)), 3, draws=3), "`draws` must be an"),
        (lambda: token_faithfulness(m, tokens, np.full((1, 4), np.nan), 3), "got NaN"),
        (lambda: token_faithfulness(m, tokens, np.zeros((1, 4)), 3, seed=-1), "`seed` must be an"),
        (lambda: token_faithfulness(m, tokens[:, :1], np.zeros((1, 1)), 3), "two real tokens"),
        (
            lambda: token_faithfulness(m, tokens, np.zeros((1, 4)), 3, baseline=np.zeros(3)),
            "`baseline` must be of shape",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
