"""Prompts carry their mask: into every tool, through jit and vmap, and never without a word."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    Logit,
    Prompts,
    attribution_patching,
    circuit_faithfulness,
    edge_attribution,
    feature_attribution,
    logit_attribution,
    patch_sweep,
    path_patching,
    residual_gradients,
    run,
    run_circuit,
)
from tests.models import batch, close, model


def marked(lengths=(3, 5), seed=0) -> Prompts:
    tokens, mask, _ = batch(seed, lengths=lengths)
    return Prompts(np.where(mask, tokens, -1).astype(np.int32), mask)


def test_unpacks_counts_and_selects():
    prompts = marked()
    tokens, mask = prompts
    assert (len(prompts), prompts.width, prompts.shape) == (2, 7, tokens.shape)
    for index in (0, -1, slice(1, 2), np.array([1, 0]), np.array([True, False])):
        some = prompts[index]
        rows = np.arange(2)[index]
        np.testing.assert_array_equal(some.tokens, tokens[np.atleast_1d(rows)])
        np.testing.assert_array_equal(some.mask, mask[np.atleast_1d(rows)])
    with pytest.raises(IndexError, match="prompt 2 of 2"):
        prompts[2]
    np.testing.assert_array_equal(np.asarray(prompts), tokens)
    assert repr(prompts) == "Prompts(2 prompts of width 7, 8 real tokens)"
    assert len(jax.tree.leaves(prompts)) == 2


def test_stand_for_tokens_and_mask():
    m, prompts = model("gpt2"), marked()
    tokens, mask = prompts
    apart = run(m, tokens, mask=mask).logits
    for both in (
        run(m, prompts).logits,
        run(m, prompts, mask=mask).logits,
        m(prompts).logits,
        jax.jit(lambda p: m(p).logits)(prompts),
        jnp.concatenate([run(m, prompts[i]).logits for i in range(2)]),
        jax.vmap(lambda p: m(p).logits[0])(jax.tree.map(lambda x: x[:, None], prompts)),
    ):
        close(both, apart, 1e-6)
    for tool in (logit_attribution, residual_gradients, feature_attribution):
        leaves = [jax.tree.leaves(tool(m, *a, 3, **k)) for a, k in (
            ((prompts,), {}), ((tokens,), {"mask": mask}))]  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, *leaves)
    with pytest.raises(ValueError, match="`mask` must be the prompts' own, or None, got another"):
        run(m, prompts, mask=np.ones_like(mask))


def test_ids_that_lost_their_mask_are_refused():
    m, prompts = model("gpt2"), marked()
    for tool in (run, lambda m, t: logit_attribution(m, t, 3), lambda m, t: residual_gradients(
        m, t, 3)):  # fmt: skip
        with pytest.raises(ValueError, match="-1 at row 0, column 0; this id marks padding: pass"):
            tool(m, prompts.tokens)


PAIRS = {
    "attribution_patching": lambda m, a, b, **k: attribution_patching(m, a, b, Logit(3), **k),
    "edge_attribution": lambda m, a, b, **k: edge_attribution(m, a, b, Logit(3), **k),
    "path_patching": lambda m, a, b, **k: path_patching(m, a, b, Logit(3), edges=(), **k),
    "run_circuit": lambda m, a, b, **k: run_circuit(m, a, b, Logit(3), circuits=[], **k),
    "circuit_faithfulness": lambda m, a, b, **k: circuit_faithfulness(
        m, a, b, Logit(3), scores=np.zeros((40, 22)), **k
    ),
    "patch_sweep": lambda m, a, b, **k: patch_sweep(m, a, b, Logit(3), **k),
}


@pytest.mark.parametrize("tool", PAIRS)
def test_pairs_of_unequal_length_are_refused(tool):
    m, call = model(), PAIRS[tool]
    clean, shorter, longer = marked((3, 5)), marked((3, 4)), marked((4, 5))
    shorter = Prompts(*(np.pad(x, ((0, 0), (1, 0)), constant_values=v)
                        for x, v in zip(shorter, (-1, False), strict=True)))  # fmt: skip
    message = "`corrupt` must be of each clean prompt's length, got 4 tokens where clean has"
    for other in (shorter, longer):
        for given in (other, other.tokens):
            with pytest.raises(ValueError, match=message):
                call(m, clean, given)
            with pytest.raises(ValueError, match=message):
                call(m, clean.tokens, given, mask=clean.mask)
    # Of full width each, or padded on another side.
    with pytest.raises(ValueError, match=message.replace("got 4", "got 5")):
        call(m, np.arange(14).reshape(2, 7), Prompts(clean.tokens, np.arange(7)[None] < [[5], [7]]))
    flipped = Prompts(clean.tokens[:, ::-1], clean.mask[:, ::-1])
    with pytest.raises(ValueError, match="got padding on another side than clean, in row 0"):
        call(m, clean, flipped)


def test_pairs_of_equal_length():
    m, clean, corrupt = model(), marked((3, 5)), marked((3, 5), seed=1)
    whole = patch_sweep(m, clean.tokens, corrupt.tokens, Logit(3), mask=clean.mask)
    for pair in ((clean, corrupt), (clean, corrupt.tokens)):
        close(patch_sweep(m, *pair, Logit(3)).effects, whole.effects, 1e-6)
    with pytest.raises(ValueError, match="got padding|got 4 tokens|of the tokens' shape|length"):
        patch_sweep(m, clean, marked((3, 6)), Logit(3))
