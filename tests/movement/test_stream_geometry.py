"""stream_geometry against numpy in float64, and on streams whose shape is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import NotCapturedError, run
from arrakis_jax.movement.stream_geometry import stream_geometry
from tests.models import batch, chosen, close, compilations, model

VARIANTS = ["llama", "gpt2", "post", "both", "parallel", "stream_after", "stream_before",
            "attention_only", "no_norm", "mixed", "one_layer"]  # fmt: skip
STATISTICS = ("participation_ratio", "effective_rank", "outlier_dims", "outlier_size")


def by_hand(x, k):
    """The statistics of vectors `[N,D]`."""
    centred = x - x.mean(0)
    variance = np.linalg.eigvalsh(centred.T @ centred / len(x))
    singular = np.linalg.svd(centred, compute_uv=False)
    p = singular / singular.sum()
    p = p[p > 1e-14]
    size = np.sqrt((x**2).mean(0) / (x**2).mean())
    dims = np.argsort(-size, kind="stable")[:k]
    rank = np.exp(-(p * np.log(p)).sum())
    return variance.sum() ** 2 / (variance**2).sum(), rank, dims, size[dims]


@pytest.mark.parametrize(
    ("variant", "first"),
    chosen([(v, i % 2 > 0) for i, v in enumerate(VARIANTS)],
           [("llama", False), ("gpt2", True), ("both", True), ("stream_after", True)]),
)  # fmt: skip
def test_against_numpy(variant, first, x64):
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side="holes", lengths=(7, 1, 5))
    found = stream_geometry(m, tokens, k=5, mask=mask, first=first)
    alone = [run(m, prompt[None]).residuals for prompt in prompts]
    for i, (name, layer) in enumerate(found.points):
        rows = [np.asarray(getattr(r, name) if layer is None else getattr(r, name)[layer])[0]
                for r in alone]  # fmt: skip
        expected = by_hand(np.concatenate([row[1 - first :] for row in rows]), 5)
        for what, value in zip(STATISTICS, expected, strict=True):
            np.testing.assert_allclose(getattr(found, what)[i], value, rtol=1e-9, err_msg=what)
        for b, row in enumerate(rows):
            close(found.norm[i, b, mask[b]], np.linalg.norm(row, axis=-1), 1e-10)
    assert not np.asarray(found.norm)[:, ~mask].any()
    growth = np.asarray(found.growth())
    close(growth.prod(0)[mask], (found.norm[-1] / found.norm[0])[mask], 1e-10)
    assert not growth[:, ~mask].any()


def with_points(r, x):
    """A stream of three layers whose points are the stacked vectors `[7,B,T,D]`."""
    return dataclasses.replace(r, resid_pre=x[:-1:2], resid_mid=x[1::2], final=x[-1])


def test_known_shapes():
    """Vectors along m axes of equal variance have m dimensions; one large axis is one outlier."""
    m = model("llama")
    tokens = np.arange(30).reshape(2, 15)
    r = run(m, tokens).residuals
    x = np.zeros((7, 30, 20), np.float32)
    for i, n_axes in enumerate((1, 2, 5, 15)):  # +1 and -1 along each axis in turn
        rows = np.arange(2 * n_axes)
        x[i, rows, rows // 2] = 1 - 2 * (rows % 2)
    x[4] = 3.0  # all the same
    x[5] = np.random.default_rng(0).normal(size=(30, 20))
    x[5, :, 7] += 100
    x[6] = x[5] * 5
    x[:, :, 1:3] += 1e4 * (np.arange(7) == 4)[:, None, None]
    found = stream_geometry(m, with_points(r, jnp.asarray(x.reshape(7, 2, 15, 20))), k=20)
    for name in ("participation_ratio", "effective_rank"):
        np.testing.assert_allclose(getattr(found, name)[:5], [1, 2, 5, 15, 0], rtol=1e-5)
        close(getattr(found, name)[5], getattr(found, name)[6], 1e-5)
    assert found.outlier_dims[5, 0] == 7 and found.outlier_size[5, 0] > 4.4
    assert set(np.asarray(found.outlier_dims[4, :2])) == {1, 2}
    np.testing.assert_allclose((np.asarray(found.outlier_size) ** 2 / 20).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.growth()[-1], 5, rtol=1e-5)


def test_float32_has_small_singular_values_right():
    """Beside a first position a thousand times longer, where a Gram matrix would lose them."""
    m = model("llama", d_model=96)
    r = run(m, np.arange(30).reshape(2, 15)).residuals
    x = np.random.default_rng(0).normal(size=(7, 2, 15, 96)).astype(np.float32)
    x[:, :, 0, 5] += 1e4
    found = stream_geometry(m, with_points(r, jnp.asarray(x)))
    for i in range(7):
        wanted = by_hand(x[i].reshape(30, 96).astype(np.float64), 8)
        close(found.effective_rank[i], wanted[1], 1e-4)
        close(found.participation_ratio[i], wanted[0], 1e-5)
    without = stream_geometry(m, with_points(r, jnp.asarray(x)), first=False)
    assert (np.asarray(without.effective_rank) > 10 * np.asarray(found.effective_rank)).all()


def test_jit_captured_streams_and_compilations():
    m = model("gpt2")
    tokens, mask, _ = batch()
    plain = stream_geometry(m, tokens, mask=mask)
    jitted = jax.jit(lambda m, t, k: stream_geometry(m, t, mask=k))(m, tokens, mask)
    out = run(m, tokens, mask=mask)
    for other in (jitted, stream_geometry(m, out), stream_geometry(m, out.residuals)):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
            close(a, b, 1e-4)
    with compilations() as names:
        stream_geometry(m, tokens[:, ::-1].copy(), mask=mask[:, ::-1].copy())
    assert names == []
    gradient = jax.grad(lambda m: stream_geometry(m, tokens, mask=mask).effective_rank.sum())(m)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    bad = jax.jit(lambda t: stream_geometry(m, t))(np.array([[1, 2, 3], [4, 99, 5]]))
    assert np.isnan(bad.effective_rank).all() and np.isnan(bad.outlier_size).all()
    assert np.isfinite(bad.norm[:, 0]).all() and np.isnan(bad.norm[:, 1, 1]).all()


def test_bad_input():
    m = model("gpt2")
    with pytest.raises(ValueError, match=r"`k` must be an int in \[1, 20\], got 21"):
        stream_geometry(m, np.arange(4)[None], k=21)
    with pytest.raises(ValueError, match="`tokens` must be 2 real tokens or more, got 1"):
        stream_geometry(m, np.array([[3]]))
    with pytest.raises(ValueError, match="must be 2 real tokens or more after each row's first"):
        stream_geometry(m, np.arange(4).reshape(2, 2)[:1], first=False)
    with pytest.raises(NotCapturedError, match=r"must be captured with \['resid_mid'\]"):
        stream_geometry(m, run(m, np.arange(4)[None], capture=("resid_pre", "final")))
