"""Random weights: the same entries, nothing else; and what they do to an attribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import feature_attribution, randomisation_check, randomised_weights
from tests.models import batch, chosen, model


@pytest.mark.parametrize("variant", chosen(["llama", "mixed"], ["llama"]))
def test_entries_are_permuted_where_asked(variant):
    m = model(variant)
    other = randomised_weights(m, 3, layers=(1,), outside=False)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(m), jax.tree.leaves(other), strict=True
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not name.startswith(("blocks", "segments")):
            np.testing.assert_array_equal(a, b)
            continue
        start = 1 if name.startswith("segments.1") else 0  # dense, then two with experts
        for i in range(len(a)):
            same = start + i != 1
            assert np.array_equal(a[i], b[i]) == same, (name, i)
            np.testing.assert_array_equal(np.sort(a[i].ravel()), np.sort(b[i].ravel()))
    every = randomised_weights(m, 3)
    assert not np.array_equal(every.w_e[...], m.w_e[...])
    np.testing.assert_array_equal(
        every.w_e[...], jax.jit(lambda m: randomised_weights(m, 3))(m).w_e[...]
    )


def test_the_cascade(demo):
    m, _ = demo
    tokens, mask, _ = batch(vocab=m.config.vocab_size, lengths=(12, 9))
    tokens = np.where(mask, tokens, 0)
    found = randomisation_check(m, lambda m: feature_attribution(m, tokens, 3, mask=mask).tokens.T)
    assert found.shape == (5, 2)
    one = randomised_weights(m, layers=(2, 3), outside=False)
    scores = [feature_attribution(x, tokens, 3, mask=mask).tokens.T for x in (one, m)]
    from arrakis_jax import agreement

    np.testing.assert_allclose(found[1], agreement(*scores).rank_correlation, atol=1e-6)
    same = randomisation_check(m, lambda _: jnp.arange(6.0)[:, None])
    np.testing.assert_allclose(same, 1, atol=1e-6)
