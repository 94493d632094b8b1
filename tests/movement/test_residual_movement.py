"""residual_movement against numpy in float64, down to tiny changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import NotCapturedError, residual_movement, run
from arrakis_jax.movement.residual_movement import movement
from tests.models import VARIANTS, batch, chosen, close, compilations, model
from tests.movement.brute import by_hand


@pytest.mark.parametrize("variant", chosen(VARIANTS))
def test_against_numpy(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    post = run(m, tokens, mask=mask).residuals.resid_post
    n = m.config.n_layers
    for first, second in ((0, -1), (n - 1, 0), (-1, -1)):
        found = residual_movement(m, tokens, first, second, mask=mask)
        expected = by_hand(post[first], post[second])
        close(found.relative_norm, expected[0], 1e-5) if first != second else None
        close(found.cosine, expected[1], 1e-5)
        np.testing.assert_allclose(found.angle, expected[2], atol=2e-3)
        for value in (found.relative_norm, found.cosine, found.angle):
            assert not np.asarray(value)[~mask].any()


def test_adjacent_layers_differ():
    """The original compared resid_post[l] with resid_pre[l + 1], the same tensor: zero."""
    m = model()
    assert residual_movement(m, np.arange(6)[None], 0, 1).relative_norm.min() > 0.1


def test_tiny_movements_are_accurate_in_float32():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(64, 4096)).astype(np.float32)
    for size in (1e-2, 1e-3, 1e-4):
        b = (a + size * rng.normal(size=a.shape)).astype(np.float32)
        found = movement(a, b)
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        relative = np.linalg.norm(b64 - a64, axis=-1) / np.linalg.norm(a64, axis=-1)
        u, w = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a64, b64))
        apart, together = np.linalg.norm(u - w, axis=-1), np.linalg.norm(u + w, axis=-1)
        np.testing.assert_allclose(found.relative_norm, relative, rtol=2e-6)
        np.testing.assert_allclose(found.angle, 2 * np.arctan2(apart, together), rtol=3e-4)


def test_right_and_opposite_angles():
    a = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]], np.float32)
    b = np.array([[0.0, 3.0], [-2.0, 0.0], [2.0, 0.0], [1.0, 0.0]], np.float32)
    found = movement(a, b)
    np.testing.assert_allclose(found.angle, [np.pi / 2, np.pi, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found.cosine, [0, -1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(found.relative_norm, [np.sqrt(10), 3, 0, 0], atol=1e-6)


def test_gradients_are_finite_where_nothing_moves():
    x = jnp.ones((3, 4))
    for name in ("relative_norm", "cosine", "angle"):
        for a, b in ((x, x), (0 * x, x), (x, -x)):
            gradient = jax.grad(lambda b, a=a, name=name: getattr(movement(a, b), name).sum())(b)
            assert np.isfinite(gradient).all(), name


def test_layers_may_be_traced_and_compile_once():
    m = model()
    tokens, mask, _ = batch()
    r = run(m, tokens, mask=mask).residuals
    pairs = jax.vmap(lambda i: residual_movement(m, r, i, 2).angle)(jnp.arange(3))
    for i in range(3):
        close(pairs[i], residual_movement(m, tokens, i, 2, mask=mask).angle, 1e-5)
    with compilations() as names:
        residual_movement(m, tokens, 1, 0, mask=mask)
    assert names == []


def test_bad_input():
    m = model()
    tokens = np.arange(4)[None]
    with pytest.raises(IndexError, match=r"`layer_idx2` must be in \[-3, 3\), got 3"):
        residual_movement(m, tokens, 0, 3)
    with pytest.raises(TypeError, match="`layer_idx1` must be an integer, got '0'"):
        residual_movement(m, tokens, "0", 3)
    with pytest.raises(NotCapturedError, match="must be captured with .*'final'"):
        residual_movement(m, run(m, tokens, capture=("resid_pre",)), 0, 1)
