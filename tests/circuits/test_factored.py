"""Factored: the algebra of thin factors against numpy's of whole matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax.circuits.factored import Factored
from tests.models import close


def factored(shape=(2, 3), d=11, k=4, n=None, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(*shape, d, k)), rng.normal(size=(*shape, k, n or d))
    return Factored(left=jnp.asarray(left, dtype), right=jnp.asarray(right, dtype))


@pytest.mark.parametrize("d, k", [(11, 4), (3, 5), (4, 4)])
def test_norms_and_values_against_numpy(d, k, x64):
    f = factored(d=d, k=k)
    full = np.asarray(f.left) @ np.asarray(f.right)
    n = min(d, k)
    close(f.expand(), full, 1e-14)
    close(f.frobenius(), np.linalg.norm(full, axis=(-2, -1)), 1e-13)
    close(f.trace(), np.trace(full, axis1=-2, axis2=-1), 1e-12)
    values = np.linalg.svd(full)[1]
    close(f.singular_values(), values[..., :n], 1e-13)
    u, s, vt = f.svd()
    assert u.shape == (2, 3, d, n) and s.shape == (2, 3, n) and vt.shape == (2, 3, n, d)
    close(u * s[..., None, :] @ vt, full, 1e-13)
    eye = np.broadcast_to(np.eye(n), (2, 3, n, n))
    close(np.swapaxes(u, -1, -2) @ u, eye, 1e-13)
    close(vt @ np.swapaxes(vt, -1, -2), eye, 1e-13)
    found, own = f.eigenvalues(), np.linalg.eigvals(full)
    assert found.shape == (2, 3, k)
    for power in (1, 2, 3):  # power sums tell multisets apart, and zeros do not count
        close((found**power).sum(-1).real, (own**power).sum(-1).real, 1e-11)
    close(np.abs(found).sum(-1), np.abs(own).sum(-1), 1e-11)


def test_small_norms_are_not_lost_in_large_factors():
    """The Gram matrices of the factors alone could not tell this product from zero in float32."""
    left = np.eye(8, 2, dtype=np.float32) * [1e4, 1e-4]
    right = np.eye(2, 8, dtype=np.float32) * np.array([[1e-8], [1e2]])
    f = Factored(left=jnp.asarray(left, jnp.float32), right=jnp.asarray(right, jnp.float32))
    close(f.singular_values(), [1e-2, 1e-4], 1e-6)
    close(f.frobenius(), np.hypot(1e-2, 1e-4), 1e-6)


@pytest.mark.parametrize("k1, k2", [(3, 5), (5, 3), (4, 4)])
def test_products_stay_factored_and_thin(k1, k2, x64):
    a, b = factored(k=k1), factored(k=k2, seed=1)
    product = a @ b
    assert product.left.shape[-1] == min(k1, k2)
    close(product.expand(), np.asarray(a.expand()) @ np.asarray(b.expand()), 1e-13)
    pairs = a[:, :, None, None] @ b[None, None]
    assert pairs.left.shape == (2, 3, 2, 3, 11, min(k1, k2))
    close(pairs[1, 2, 0, 1].expand(), (a[1, 2] @ b[0, 1]).expand(), 1e-13)
    close(a.transposed.expand(), np.swapaxes(a.expand(), -1, -2), 0)
    wide = factored(d=11, k=3, n=12)
    assert wide.shape == (2, 3, 11, 12) and (a @ wide).shape == (2, 3, 11, 12)


def test_indexing(x64):
    f = factored()
    close(f[1, 2].expand(), f.expand()[1, 2], 0)
    close(f[:, np.array([0, 2])].expand(), f.expand()[:, [0, 2]], 0)
    close(f[-1].left, f.left[-1], 0)
    one = jax.jit(lambda f, i: f[i, 0])(f, 1)
    close(one.left, f.left[1, 0], 0)
    for index in ((2,), (0, 3), (0, 0, 0), (..., 0, 0, 0)):
        with pytest.raises(IndexError, match=r"`index` must be within \[2, 3\], got .*only axes"):
            f[index]


def test_errors_of_factored():
    f = factored(dtype=np.float32)
    with pytest.raises(ValueError, match=r"at least the 2904 bytes of \[2, 3, 11, 11\], got 2903"):
        f.expand(byte_limit=2903)
    f.expand(byte_limit=2904)
    with pytest.raises(TypeError, match="must be made of numbers, got a traced array; call it out"):
        jax.jit(lambda f: jnp.asarray(f.eigenvalues()))(f)
    wide = factored(n=12, dtype=np.float32)
    for method in (wide.trace, wide.eigenvalues):
        with pytest.raises(ValueError, match=r"must be square to have .*got \[11, 12\]; leave out"):
            method()
    with pytest.raises(ValueError, match=r"`other` must be of 12 rows, got \[2, 3, 11, 12\] @"):
        wide @ f
    with pytest.raises(TypeError, match="`other` must be Factored, got ndarray; multiply an array"):
        f @ np.eye(11)
