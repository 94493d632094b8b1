"""movement_matrix against numpy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Capture, movement_matrix, residual_movement, run
from arrakis_jax.movement import movement_matrix as module
from arrakis_jax.movement.residual_movement import movement
from arrakis_jax.stream.points import point_fields
from tests.cost import temporary
from tests.models import batch, chosen, close, model
from tests.movement.brute import by_hand


@pytest.mark.parametrize("variant", ["llama", "attention_only"])
def test_matrix(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    r = run(m, tokens, mask=mask).residuals
    found = movement_matrix(m, tokens, mask=mask)
    p = len(found.points)
    assert p == (7 if variant == "llama" else 4) and found.angle.shape == (p, p, *mask.shape)
    stream = [getattr(r, name) if layer is None else getattr(r, name)[layer]
              for name, layer in found.points]  # fmt: skip
    for i in range(p):
        for j in range(p):
            relative, cosine, _ = by_hand(stream[i], stream[j])
            np.testing.assert_allclose(found.relative_norm[i, j], relative, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.cosine[i, j], cosine, atol=1e-5)
    again = movement_matrix(m, r)
    close(again.angle, found.angle, 1e-5)
    i, j = found.points.index(("resid_pre", 1)), found.points.index(("final", None))
    pair = residual_movement(m, tokens, 0, -1, mask=mask)
    close(found.relative_norm[i, j], pair.relative_norm, 1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_padded_equals_one_by_one(side, x64):
    m = model("gpt2", dtype="float64")
    tokens, mask, prompts = batch(side=side)
    pair = residual_movement(m, tokens, 0, 2, mask=mask)
    matrix = movement_matrix(m, tokens, mask=mask)
    for b, prompt in enumerate(prompts):
        alone = residual_movement(m, prompt[None], 0, 2)
        every = movement_matrix(m, prompt[None])
        for name in ("relative_norm", "cosine", "angle"):
            row = np.asarray(getattr(pair, name))[b, mask[b]]
            np.testing.assert_allclose(row, getattr(alone, name)[0], atol=1e-10)
            rows = np.asarray(getattr(matrix, name))[:, :, b, mask[b]]
            np.testing.assert_allclose(rows, getattr(every, name)[:, :, 0], atol=1e-7)


def test_a_stream_that_is_nan_stays_nan():
    """A traced id outside of the vocabulary poisons its own row, in every tool."""
    m, tokens = model(), np.array([[1, 2, 3], [4, 99, 5]])
    moved = jax.jit(lambda t: residual_movement(m, t, 0, 1))(tokens)
    matrix = jax.jit(lambda t: movement_matrix(m, t))(tokens)
    for values in (*jax.tree.leaves(moved), *(x[0, 1] for x in jax.tree.leaves(matrix))):
        assert np.isfinite(values[0]).all() and np.isnan(values[1, 1:]).all()


def left(mask, first):
    return mask if first else mask & (np.cumsum(mask, 1) > 1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("reduce", [None, "mean", "median", "ratio_of_means"])
@pytest.mark.parametrize("variant", chosen(["gpt2", "parallel", "stream_after"], ["parallel"]))
def test_reducers_against_numpy(variant, reduce, first, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch(side="holes")
    r = run(m, tokens, mask=mask).residuals
    found = movement_matrix(m, tokens, mask=mask, reduce=reduce, first=first)
    kept = left(mask, first)
    stream = [np.asarray(getattr(r, name) if layer is None else getattr(r, name)[layer])[kept]
              for name, layer in found.points]  # fmt: skip
    take = {"mean": np.mean, "median": np.median, "ratio_of_means": np.mean}.get(reduce, np.array)
    for i, a in enumerate(stream):
        for j, b in enumerate(stream):
            relative, cosine, angle = by_hand(a, b)
            if reduce == "ratio_of_means":
                a_size, moved = (np.linalg.norm(x, axis=-1) for x in (a, b - a))
                relative = moved.mean() / a_size.mean()
            for name, value in zip(
                ("relative_norm", "cosine", "angle"), (relative, cosine, angle), strict=True
            ):
                own = np.asarray(getattr(found, name)[i, j])
                if reduce is None:
                    assert not own[~kept].any()
                    own = own[kept]
                np.testing.assert_allclose(own, take(value), atol=1e-7, err_msg=name)


def test_a_first_position_that_rules_the_mean():
    """Means of ratios and of norms differ, and both differ without the first token."""
    m = model("gpt2")
    tokens, mask, _ = batch()
    r = run(m, tokens, mask=mask).residuals
    first = mask & (np.cumsum(mask, 1) == 1)
    scale = np.where(first, 1e3, 1)[..., None].astype(np.float32)
    huge = dataclasses.replace(r, **{
        name: getattr(r, name) * (scale if name == "final" else scale[None])
        for name in ("resid_mid", "final")
    })  # fmt: skip
    found = {(how, f): movement_matrix(m, huge, reduce=how, first=f).relative_norm[0, -1]
             for how in ("mean", "median", "ratio_of_means") for f in (True, False)}  # fmt: skip
    assert found["mean", True] > 20 * found["mean", False]
    assert found["ratio_of_means", True] > 20 * found["ratio_of_means", False]
    assert found["median", True] < 2 * found["median", False]
    assert abs(found["mean", False] / found["ratio_of_means", False] - 1) > 1e-3


def test_reduced_from_a_stream_at_some_positions():
    m = model("llama")
    tokens, mask, _ = batch()
    whole = movement_matrix(m, tokens, mask=mask)
    some = run(m, tokens, mask=mask, capture=Capture(point_fields(m.config), positions=(0, -1)))
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    values = np.asarray(whole.angle)[:, :, range(5), last]
    single = mask.sum(1) == 1  # whose last token is their first
    close(movement_matrix(m, some, first=False).angle[:, :, ~single, 1], values[..., ~single], 1e-4)
    found = movement_matrix(m, some, reduce="mean", first=False)
    close(found.angle, values[..., ~single].mean(-1), 1e-4)


@pytest.mark.parametrize("d_model, length", [(12, 9), (16, 127), (8, 130)])
def test_parts_of_dimensions_and_positions(d_model, length, x64, monkeypatch):
    """Neither need be a multiple of what is done at once."""
    monkeypatch.setattr(module, "AT_ONCE", 64)
    points = jax.random.normal(jax.random.key(0), (5, 2, length, d_model), jnp.float64)
    found, moved = jax.jit(module._over_positions)(points)
    expected = movement(points[:, None], points[None])
    for name in ("relative_norm", "cosine", "angle"):
        close(getattr(found, name), getattr(expected, name), 1e-7)
    close(moved, np.linalg.norm(points[:, None] - points[None], axis=-1), 1e-12)


def test_lengths_of_a_bfloat16_stream_are_summed_in_float32():
    m = model("llama")
    tokens, mask, _ = batch()
    r = run(m, tokens, mask=mask).residuals
    fields = ("resid_pre", "resid_mid", "final")
    rounded = dataclasses.replace(r, **{n: getattr(r, n).astype(jnp.bfloat16) for n in fields})
    again = dataclasses.replace(r, **{n: getattr(rounded, n).astype(jnp.float32) for n in fields})
    for reduce in (None, "ratio_of_means"):
        found, wanted = (movement_matrix(m, x, reduce=reduce) for x in (rounded, again))
        close(found.relative_norm, wanted.relative_norm, 1e-6)


def test_pairs_take_little_memory_beside_the_points():
    """Reduced or not: no vectors of all pairs exist, nor another copy of all points."""
    m, tokens = model("llama", n_layers=4, d_model=256), jnp.zeros((4, 128), int)
    size = 9 * tokens.size * 256 * 4
    forward = temporary(lambda t: run(m, t, capture=point_fields(m.config)), tokens)
    for reduce in (None, "mean", "median", "ratio_of_means"):
        taken = temporary(lambda t, how=reduce: movement_matrix(m, t, reduce=how), tokens)
        assert taken < forward + 1.7 * size, reduce


def test_reduced_nan_stays_nan_and_bad_reducers():
    m, tokens = model(), np.array([[1, 2, 3], [4, 99, 5]])
    for reduce in ("mean", "median", "ratio_of_means"):
        found = jax.jit(lambda t, reduce=reduce: movement_matrix(m, t, reduce=reduce))(tokens)
        assert all(np.isnan(x).all() for x in jax.tree.leaves(found))
    with pytest.raises(ValueError, match="`reduce` must be one of .*'median'.*, got 'max'"):
        movement_matrix(m, tokens[:1], reduce="max")
    with pytest.raises(ValueError, match="`tokens` must be 1 real tokens or more after each row's"):
        movement_matrix(m, tokens[:1, :1], reduce="mean", first=False)
    assert not movement_matrix(m, tokens[:1, :1], first=False).angle.any()
