"""G5: bigrams are the model without layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import ModelConfig, Transformer, run
from arrakis_jax.circuits.bigrams import bigram_logits, top_bigrams
from arrakis_jax.circuits.vocabulary import top_tokens
from tests.models import close, model

IDS = np.array([4, 0, 30, 4, 17])


def test_a_bigram_table_is_its_log_probabilities(x64):
    """G5."""
    v, rng = 13, np.random.default_rng(0)
    p = rng.dirichlet(np.ones(v), v)
    config = ModelConfig(
        n_layers=0, d_model=v, n_heads=1, n_kv_heads=1, d_head=1, d_mlp=0, vocab_size=v,
        norm=None, norm_eps=None, positions=None, max_positions=9, dtype="float64",
    )  # fmt: skip
    m = Transformer(config, rngs=nnx.Rngs(0))
    m.w_e[...], m.w_u[...] = jnp.eye(v), jnp.log(p)
    tokens = rng.integers(v, size=(2, 7))
    np.testing.assert_allclose(jax.nn.softmax(run(m, tokens).logits), p[tokens], atol=1e-12)
    np.testing.assert_allclose(bigram_logits(m, np.arange(v)), np.log(p), atol=1e-12)
    found = top_bigrams(m, np.arange(v), v)
    np.testing.assert_allclose(found.values, -np.sort(-np.log(p)), atol=1e-12)
    np.testing.assert_array_equal(found.tokens, np.argsort(-p))


@pytest.mark.parametrize(
    "variant", ["llama", "gpt2", "unembed_bias", "shared_norm", "no_norm", "bare_norm", "scaled"]
)
def test_bigrams_are_the_model_without_layers(variant, x64):
    m = model(variant, n_layers=0, dtype="float64")
    learned = m.w_pos is not None
    found = bigram_logits(m, IDS, positions=np.arange(5) if learned else None)
    close(found, run(m, IDS[None]).logits[0], 1e-12)
    frozen = bigram_logits(m, IDS, scale=2.0)
    if m.norm_final is None:
        close(frozen, found, 1e-12)
    else:
        twice = bigram_logits(m, IDS, scale=4.0)
        assert np.abs(np.asarray(frozen - twice)).max() > 0.01


@pytest.mark.parametrize("chunk", [1, 7, 30, 31, 100])
def test_the_vocabulary_by_pieces(chunk):
    table = np.random.default_rng(0).normal(size=(4, 31)).astype(np.float32) - 5
    table[:, -1] += 3  # a column beyond the vocabulary would repeat the last one
    found = top_tokens(31, 9, 4, lambda ids: jnp.asarray(table)[:, ids], chunk)
    np.testing.assert_array_equal(found.tokens, np.argsort(-table)[:, :9])
    np.testing.assert_array_equal(found.values, -np.sort(-table)[:, :9])
