"""Bad input: a clear error before any work, from every public function that takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    decompose,
    feature_attribution,
    logit_attribution,
    movement_matrix,
    residual_gradients,
    residual_movement,
    run,
)
from tests.models import model

V, LIMIT = 31, 40
GOOD = np.arange(12).reshape(2, 6)
FULL = np.ones((2, 6), bool)
TAKING_TOKENS = {
    "run": run,
    "decompose": decompose,
    "logit_attribution": lambda m, t, mask=None: logit_attribution(m, t, 3, mask=mask),
    "residual_movement": lambda m, t, mask=None: residual_movement(m, t, 0, 1, mask=mask),
    "movement_matrix": movement_matrix,
    "residual_gradients": lambda m, t, mask=None: residual_gradients(m, t, 3, mask=mask),
    "feature_attribution": lambda m, t, mask=None: feature_attribution(m, t, 3, mask=mask),
}


def with_id(value):
    tokens = GOOD.copy()
    tokens[1, 2] = value
    return tokens


def with_mask(row):
    mask = FULL.copy()
    mask[1] = row
    return mask


BAD = {
    "negative": (with_id(-1), None, ValueError, r"must be in \[0, 31\).* -1 at row 1, column 2"),
    "too large": (with_id(V), None, ValueError, r"must be in \[0, 31\) .*, got 31 at row 1"),
    "too large at a real token": (with_id(99), FULL, ValueError, r"must be in \[0, 31\) .*got 99"),
    "on the device": (jnp.asarray(with_id(V)), None, ValueError, r"must be in \[0, 31\) .*got 31"),
    "a list": (with_id(V).tolist(), None, ValueError, r"must be in \[0, 31\) .*got 31"),
    "floats": (GOOD.astype(float), None, TypeError, "must be integers, got dtype float64; encode"),
    "text": (["Mary"], None, TypeError, "must be an array of token ids .*, got list; .*encode"),
    "ragged": ([[1, 2], [3]], None, TypeError, "must be an array of token ids .*; pad ragged rows"),
    "one axis": (GOOD[0], None, ValueError, r"must be `\[B,T\]`, of rank 2, got shape \(6,\)"),
    "three axes": (GOOD[None], None, ValueError, r"must be .* got shape \(1, 2, 6\)"),
    "no token": (GOOD[:, :0], None, ValueError, "must be at least one token long, got T = 0"),
    "too long": (
        np.zeros((1, LIMIT + 1), int), None, ValueError, "must be at most 40 tokens long, got 41"
    ),
    "too long under a mask": (
        np.zeros((1, 50), int), np.arange(50)[None] < 41, ValueError, "at most 40 .*got 41"
    ),
    "other mask": (GOOD, FULL[:, :5], ValueError, r"`mask` must be .* \(2, 6\), got \(2, 5\)"),
    "float mask": (GOOD, FULL.astype(float), TypeError, "`mask` must be bool .* float64"),
    "mask of twos": (GOOD, 2 * FULL.astype(int), ValueError, r"`mask` must be .*, got \[2\]"),
    "empty row": (GOOD, with_mask(False), ValueError, r"`mask` must be .*, got none in rows \[1\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("tool", TAKING_TOKENS)
def test_bad_tokens_and_masks(tool, case):
    tokens, mask, error, message = BAD[case]
    with pytest.raises(error, match=message):
        TAKING_TOKENS[tool](model("gpt2"), tokens, mask=mask)


def test_what_is_allowed():
    m = model("gpt2")
    want = run(m, GOOD).logits
    for tokens in (GOOD.tolist(), jnp.asarray(GOOD), GOOD.astype(np.int8), GOOD.astype(np.uint64)):
        np.testing.assert_array_equal(run(m, tokens).logits, want)
    for mask in (FULL, FULL.tolist(), FULL.astype(int), jnp.asarray(FULL)):
        np.testing.assert_allclose(run(m, GOOD, mask=mask).logits, want, atol=1e-5)
    wide = np.arange(50)[None] % V
    assert np.isfinite(run(m, wide, mask=wide < LIMIT // 2).logits).all()
    rotary = run(model("llama"), wide)
    assert np.isfinite(rotary.logits).all()  # RoPE has no table to end


def test_what_cannot_be_checked_is_nan_and_never_wrong():
    """Traced ids out of range poison their own row, and no other."""
    m = model("gpt2")
    logits = jax.jit(lambda t: run(m, t).logits)(with_id(V))
    assert np.isnan(logits[1, 2:]).all() and np.isfinite(logits[0]).all()
    logits = jax.jit(lambda t: run(m, t).logits)(with_id(-1))
    assert np.isnan(logits[1, 2:]).all() and np.isfinite(logits[0]).all()
