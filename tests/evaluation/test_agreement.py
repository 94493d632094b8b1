"""Agreement of estimated with exact effects, against SciPy and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import spearmanr

from arrakis_jax import PatchEffects, agreement


def test_rank_correlation_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    found, exact = rng.integers(-3, 4, size=(2, 40, 5)).astype(float)
    ranks = agreement(found, exact, least=-1.0)
    for b in range(5):
        wanted = spearmanr(found[:, b], exact[:, b]).statistic
        np.testing.assert_allclose(ranks.rank_correlation[b], wanted, atol=1e-6)
    some = agreement(found, exact, least=np.arange(5) / 2)
    for b in range(5):
        kept = np.abs(exact[:, b]) > b / 2
        wanted = spearmanr(found[kept, b], exact[kept, b]).statistic
        np.testing.assert_allclose(some.rank_correlation[b], wanted, atol=1e-6)
        assert some.n[b] == kept.sum()


def test_signs_overlap_and_what_was_missed():
    exact = np.array([100.0, -90, 80, -5, 4, 3, -2, 1, 0.5, -0.1])[:, None]
    found = exact.copy()
    found[1] = 90  # a wrong sign
    found[2] = 0.01  # missed
    one = agreement(found, exact, share=0.3)
    assert one.sign_agreement[0] == pytest.approx(0.9)
    assert one.top_overlap[0] == pytest.approx(2 / 3)
    assert one.false_negatives[0] == pytest.approx(1 / 3)
    # Above the noise of 50 three are left, of which the largest is found.
    three = agreement(found, exact, least=50.0, share=0.3)
    assert three.n[0] == 3 and three.top_overlap[0] == 1 and three.false_negatives[0] == 0
    assert three.sign_agreement[0] == pytest.approx(2 / 3)


def test_shapes_jit_and_no_order():
    exact = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 2)))
    one = agreement(-exact, exact)
    np.testing.assert_allclose(one.rank_correlation, -1, atol=1e-6)
    np.testing.assert_array_equal(one.sign_agreement, 0)
    jitted = jax.jit(lambda a, b: agreement(a, b).rank_correlation)(-exact, exact)
    np.testing.assert_allclose(jitted, -1, atol=1e-6)
    assert np.isnan(agreement(jnp.ones((5, 1)), exact[:, :1, 0].repeat(5, 0)[:5]).rank_correlation)


def test_nan_is_not_hidden():
    exact = np.random.default_rng(0).normal(size=(10, 3))
    found = exact.copy()
    found[4, 0] = exact[4, 1] = np.nan
    for value in (agreement(found, exact).rank_correlation, agreement(found, exact).sign_agreement):
        np.testing.assert_allclose(value, [np.nan, np.nan, 1], atol=1e-6)


def test_other_cells_are_refused():
    shape = dict(base=jnp.zeros(1), sites=("z",))
    cells = [
        PatchEffects(effects=jnp.ones((2, 3, 1)), over=over, **shape)
        for over in (("layer", "head"), ("layer", "position"))
    ]
    with pytest.raises(ValueError, match="`found` must be of Cells"):
        agreement(*cells)


def test_bad_input():
    with pytest.raises(TypeError, match="`found` must be an array of numbers, got str"):
        agreement("x", np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"`found` must be of exact's shape \(3, 2\)"):
        agreement(np.zeros((4, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"`share` must be in \(0, 1\], got 0"):
        agreement(np.zeros((3, 2)), np.zeros((3, 2)), share=0)
