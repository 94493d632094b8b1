"""linear_cka against the unbiased estimate written out with whole matrices, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import NotCapturedError, run
from arrakis_jax.movement import linear_cka as module
from arrakis_jax.movement.linear_cka import cka, linear_cka
from tests.models import batch, chosen, close, compilations, model

VARIANTS = ["llama", "gpt2", "post", "both", "parallel", "stream_after", "stream_before",
            "attention_only", "no_norm", "mixed", "one_layer"]  # fmt: skip


def hsic(x, y):
    """Song et al. 2012, equation 5, on vectors that are not centred."""
    n, ones = len(x), np.ones(len(x))
    k, h = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(h, 0)
    whole = np.trace(k @ h) + (ones @ k @ ones) * (ones @ h @ ones) / ((n - 1) * (n - 2))
    return (whole - 2 / (n - 2) * ones @ k @ h @ ones) / (n * (n - 3))


@pytest.mark.parametrize(
    ("variant", "first"),
    chosen([(v, i % 2 > 0) for i, v in enumerate(VARIANTS)],
           [("llama", False), ("gpt2", True), ("both", True), ("stream_after", True)]),
)  # fmt: skip
def test_against_numpy(variant, first, x64):
    """Padded, against the prompts alone."""
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side="holes", lengths=(7, 1, 5))
    found = linear_cka(m, tokens, mask=mask, first=first)
    alone = [run(m, prompt[None]).residuals for prompt in prompts]
    points = []
    for name, layer in found.points:
        rows = [getattr(r, name) if layer is None else getattr(r, name)[layer] for r in alone]
        points.append(np.concatenate([np.asarray(row)[0, 1 - first :] for row in rows]))
    each = np.array([[hsic(x, y) for y in points] for x in points])
    scale = np.sqrt(np.diagonal(each))
    np.testing.assert_allclose(found.value, each / scale[:, None] / scale, atol=1e-10)
    np.testing.assert_allclose(np.diagonal(found.value), 1, atol=1e-12)


@pytest.mark.parametrize("entries", [1, 7 * 24 * 5, 2**24])
def test_rotations_scales_shifts_and_blocks_change_nothing(entries, monkeypatch, x64):
    monkeypatch.setattr(module, "ENTRIES", entries)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 2, 12, 9))
    kept = rng.random((2, 12)) < 0.8
    turn = np.linalg.qr(rng.normal(size=(7, 9, 9)))[0]
    sizes, shifts = rng.uniform(0.1, 9, size=7), rng.normal(size=(7, 9))
    moved = np.einsum("PBTD,PDE->PBTE", x, turn) * sizes[:, None, None, None]
    moved = moved + shifts[:, None, None]
    expected = np.array([[hsic(a[kept], b[kept]) for b in x] for a in x])
    scale = np.sqrt(np.diagonal(expected))
    for points in (x, moved):
        found = cka(jnp.asarray(points), jnp.asarray(kept))
        np.testing.assert_allclose(found, expected / scale[:, None] / scale, atol=1e-12)


def test_unrelated_points_and_equal_vectors_in_float32():
    """The biased estimate would be near 1 here: 60 tokens in 400 dimensions."""
    x = np.random.default_rng(0).normal(size=(4, 1, 60, 400)).astype(np.float32)
    x[2] = x[0] + 3 * x[1]
    rounding = 1 + 1e-7 * np.random.default_rng(1).choice([-1, 1], size=(60, 400))
    x[3] = x[0, :, :1] * rounding  # all the same: nothing to compare
    found = np.asarray(cka(jnp.asarray(x), jnp.ones((1, 60), bool)))
    assert abs(found[0, 1]) < 0.1 and found[1, 2] > 0.8
    np.testing.assert_allclose(np.diagonal(found), [1, 1, 1, 0], atol=1e-5)
    assert not found[3].any() and not found[:, 3].any()


def test_no_gram_matrix_of_all_points_exists(monkeypatch):
    monkeypatch.setattr(module, "ENTRIES", 7 * 32 * 3)
    x, kept = jnp.zeros((7, 4, 8, 5)), jnp.ones((4, 8), bool)
    shapes = str(jax.make_jaxpr(cka)(x, kept))
    assert "[7,3,32]" in shapes and "[7,32,32]" not in shapes


def test_jit_captured_streams_and_compilations():
    m = model("gpt2")
    tokens, mask, _ = batch()
    plain = linear_cka(m, tokens, mask=mask).value
    out = run(m, tokens, mask=mask)
    close(jax.jit(lambda m, t, k: linear_cka(m, t, mask=k).value)(m, tokens, mask), plain, 1e-5)
    for source in (out, out.residuals):
        close(linear_cka(m, source).value, plain, 1e-5)
    with compilations() as names:
        linear_cka(m, tokens[:, ::-1].copy(), mask=mask[:, ::-1].copy())
    assert names == []
    gradient = jax.grad(lambda m: linear_cka(m, tokens, mask=mask).value.sum())(m)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    three = np.arange(11)[None] < np.array([[2], [1], [0], [0], [0]])
    assert np.isnan(jax.jit(lambda k: linear_cka(m, tokens, mask=k).value)(three)).all()
    assert np.isnan(jax.jit(lambda t: linear_cka(m, t).value)(np.array([[1, 2, 3, 99, 5]]))).all()


def test_bad_input():
    m = model("gpt2")
    with pytest.raises(ValueError, match="`tokens` must be 4 real tokens or more, got 3"):
        linear_cka(m, np.arange(3)[None])
    with pytest.raises(ValueError, match="4 real tokens or more after each row's first, got 3"):
        linear_cka(m, run(m, np.arange(4)[None]), first=False)
    with pytest.raises(NotCapturedError, match=r"must be captured with \['resid_mid'\]"):
        linear_cka(m, run(m, np.arange(4)[None], capture=("resid_pre", "final")))
