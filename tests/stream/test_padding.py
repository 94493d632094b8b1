"""Every public function gives a padded batch's prompts the results that they have alone (G19).

In float32, at the tolerances that hold there; the tests of each tool do it in float64.
"""

import functools

import jax
import numpy as np
import pytest

from arrakis_jax import (
    decompose,
    edge_attribution,
    feature_attribution,
    logit_attribution,
    movement_matrix,
    patch_sweep,
    residual_decomposition,
    residual_gradients,
    residual_movement,
    resume,
    run,
)
from arrakis_jax.stream.padding import Padding, select_positions
from tests.models import batch, chosen, model

# name: (function of (model, tokens, mask), axis of B in each array, axis of T or None, tolerance)
TOOLS = {
    "logits": (lambda m, t, k: run(m, t, mask=k).logits, 0, 1, 1e-5),
    "final": (lambda m, t, k: run(m, t, mask=k).residuals.final, 0, 1, 1e-5),
    "resid_post": (lambda m, t, k: run(m, t, mask=k).residuals.resid_post, 1, 2, 1e-5),
    "resume": (lambda m, t, k: resume(m, m.embed(t, mask=k), 0, mask=k).logits, 0, 1, 1e-5),
    "residual_decomposition": (
        lambda m, t, k: residual_decomposition(run(m, t, mask=k), 1).from_attn, 0, 1, 1e-5
    ),
    "decompose": (lambda m, t, k: decompose(m, t, mask=k, by="head").terms, 1, 2, 1e-5),
    "norms": (lambda m, t, k: decompose(m, t, mask=k, by="head").norms(), 1, 2, 1e-5),
    "logit_attribution": (
        lambda m, t, k: logit_attribution(m, t, 3, mask=k, by="head").terms, 1, None, 1e-5
    ),
    "logit_attribution everywhere": (
        lambda m, t, k: logit_attribution(m, t, 3, mask=k, position=None).terms, 1, 2, 1e-5
    ),
    "relative_norm": (
        lambda m, t, k: residual_movement(m, t, 0, -1, mask=k).relative_norm, 0, 1, 1e-5
    ),
    "angle": (lambda m, t, k: movement_matrix(m, t, mask=k).angle, 2, 3, 1e-5),
    "residual_gradients": (
        lambda m, t, k: residual_gradients(m, t, 3, mask=k).resid_mid, 1, 2, 1e-4
    ),
    **{
        method: (
            functools.partial(
                lambda m, t, k, method: feature_attribution(m, t, 3, mask=k, method=method).tokens,
                method=method,
            ), 0, 1, tolerance,
        )
        for method, tolerance in {
            "saliency": 1e-4, "grad_x_input": 1e-6, "integrated_gradients": 1e-4,
            "smooth_grad": 1e-4, "occlusion": 1e-4, "value_zeroing": 1e-4,
        }.items()
    },
    # Of pairs, whose source has other tokens. `[L,T,B]`: without B, T is the second axis.
    "patch_sweep": (
        lambda m, t, k: patch_sweep(m, t, (t + 1) % 31, 3, mask=k).effects, 2, 2, 1e-4
    ),
    "edge_attribution": (
        lambda m, t, k: edge_attribution(m, t, (t + 1) % 31, 3, steps=2, mask=k).effects,
        2, None, 1e-4,
    ),
    "layers": (lambda m, t, k: feature_attribution(m, t, 3, mask=k).layers, 1, 2, 1e-4),
}  # fmt: skip


# One of each kind of result.
SHORT = ("resid_post", "resume", "residual_decomposition", "decompose", "logit_attribution",
         "relative_norm", "angle", "residual_gradients", "grad_x_input", "occlusion",
         "value_zeroing", "patch_sweep")  # fmt: skip


def scale_of(name, m, prompt, found):
    """What errors are measured by: the largest value, or of products that cancel, their sizes.

    A norm keeps a lone token's logit where its embedding is scaled: its gradient x input is a
    thousandth of what it sums.
    """
    if name != "grad_x_input":
        return np.abs(found).max()
    gradient = residual_gradients(m, prompt[None], 3, capture=("embed",)).embed
    return np.abs(gradient * m.embed(prompt[None])).sum(-1).max()


@pytest.mark.filterwarnings("ignore:integrated gradients")
@pytest.mark.parametrize("variant", chosen(["llama3", "gpt2"], ["gpt2"]))
@pytest.mark.parametrize("name", chosen(TOOLS, SHORT))
def test_in_float32(name, variant):
    tool, at_batch, at_token, tolerance = TOOLS[name]
    m = model(variant)
    alone = None
    for side in ("left", "right", "holes"):
        tokens, mask, prompts = batch(side=side, lengths=(7, 7, 1))
        tokens = np.where(mask, tokens, 0)
        whole = np.asarray(tool(m, tokens, mask))
        if alone is None:
            alone = [np.asarray(tool(m, prompt[None], None)) for prompt in prompts]
        for b, one in enumerate(alone):
            row, want = np.take(whole, b, at_batch), np.take(one, 0, at_batch)
            if at_token is not None:
                row = np.compress(mask[b], row, at_token - 1)
            error, scale = np.abs(row - want).max(), scale_of(name, m, prompts[b], want)
            assert error <= tolerance * scale, f"{side}, row {b}: {error / scale:.2g}"


def test_vmap_over_prompts_equals_the_batch():
    m = model()
    tokens = np.random.default_rng(0).integers(31, size=(4, 6))
    rows = jax.vmap(lambda t: logit_attribution(m, t[None], 3, by="head").terms[:, 0])(tokens)
    np.testing.assert_allclose(rows.T, logit_attribution(m, tokens, 3, by="head").terms, atol=1e-5)


def test_positions_that_a_row_lacks_are_absent():
    """Also where the column that stands for them holds a real token, as with padding behind."""
    padding = Padding.of((2, 3), np.array([[1, 1, 0], [1, 1, 1]], bool))
    index, valid = padding.columns(np.array([[2, -1], [2, -3]]))
    values = np.arange(1.0, 7).reshape(2, 3)
    found = select_positions(values, index, valid, 1, absent=-1)
    np.testing.assert_array_equal(found, [[-1, 2], [6, 4]])
