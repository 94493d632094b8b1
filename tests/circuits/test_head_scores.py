"""head_scores: METHOD's index sets on repeated tokens, and a literal loop on anything else."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import run
from arrakis_jax.circuits.head_scores import head_scores, repeated_tokens
from tests.induction import N, V as VOCAB, induction_model
from tests.models import batch, chosen, close, compilations, model

VARIANTS = ("llama", "gpt2", "parallel", "stream_after", "mixed", "gpt_oss", "attention_only",
            "no_norm", "one_layer")  # fmt: skip
KINDS = ("previous", "first", "duplicate", "induction")


def brute(pattern, tokens):
    """The scores of one prompt without padding, `pattern [L,H,T,T]`, in a loop over queries."""
    found = {kind: [] for kind in KINDS}
    for q in range(len(tokens)):
        earlier = [p for p in range(q) if tokens[p] == tokens[q]]
        if q:
            found["previous"].append(pattern[..., q, q - 1])
            found["first"].append(pattern[..., q, 0])
        if earlier:
            found["duplicate"].append(pattern[..., q, earlier[-1]])
        if earlier and earlier[-1] + 1 < q:
            found["induction"].append(pattern[..., q, earlier[-1] + 1])
    none = np.zeros(pattern.shape[:2])
    means = {kind: np.mean(x, 0) if x else none for kind, x in found.items()}
    return means, len(found["duplicate"]), len(found["induction"])


def brute_mul(pattern, tokens):
    """TransformerLens' detector: the share of attention on a 0/1 pattern made from the tokens."""
    same = np.tril(tokens[:, None] == tokens[None, :], -1)
    shifted = np.tril(np.concatenate([np.zeros((len(tokens), 1)), same[:, :-1]], 1))
    first = np.zeros_like(shifted)
    first[:, 0] = 1
    masks = {"previous": np.eye(len(tokens), k=-1), "first": first, "duplicate": same,
             "induction": shifted}  # fmt: skip
    total = pattern.sum((-2, -1))
    return {kind: (pattern * mask).sum((-2, -1)) / total for kind, mask in masks.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_repeated_tokens_these_are_the_diagonals_of_the_second_copy(variant, x64):
    m, n = model(variant, dtype="float64"), 7
    tokens = repeated_tokens(0, 31, n=n, batch=3, bos=2)
    pattern = np.asarray(run(m, tokens, capture=("pattern",)).residuals.pattern)
    second, later = np.arange(n + 1, 2 * n + 1), np.arange(1, 2 * n + 1)
    found = head_scores(m, tokens)
    for kind, queries, keys in [
        ("induction", second, second - n + 1), ("duplicate", second, second - n),
        ("previous", later, later - 1), ("first", later, 0 * later),
    ]:  # fmt: skip
        expected = pattern[..., queries, keys].mean(-1)
        close(getattr(found, kind), np.moveaxis(expected, 1, -1), 1e-12, kind)
    np.testing.assert_array_equal(found.queries, n)
    np.testing.assert_array_equal(found.repeats, n)


@pytest.mark.parametrize("side", ["left", "holes"])
@pytest.mark.parametrize("definition", ["mean", "mul"])
@pytest.mark.parametrize("variant", chosen(VARIANTS[1:6], ["stream_after", "mixed"]))
def test_any_text_equals_a_loop_over_its_queries(variant, definition, side, x64):
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(vocab=4, lengths=(9, 14, 2, 1, 6), side=side)  # many repeats
    pattern = np.asarray(run(m, tokens, mask=mask, capture=("pattern",)).residuals.pattern)
    found = head_scores(m, tokens, mask=mask, definition=definition)
    for b, prompt in enumerate(prompts):
        own = pattern[:, b][:, :, mask[b]][..., mask[b]]
        expected, repeats, queries = brute(own, prompt)
        if definition == "mul":
            expected = brute_mul(own, prompt)
        for kind in KINDS:
            np.testing.assert_allclose(
                getattr(found, kind)[..., b], expected[kind], atol=1e-12, err_msg=f"{kind} {b}"
            )
        assert (found.repeats[b], found.queries[b]) == (repeats, queries)
    assert (np.asarray(found.queries) > 0).any() and found.queries[3] == 0
    alone = head_scores(m, prompts[1][None], definition=definition)
    for kind in KINDS:
        np.testing.assert_allclose(
            getattr(found, kind)[..., 1], getattr(alone, kind)[..., 0], atol=1e-10
        )


def test_a_token_twice_in_a_row_is_no_induction_query(x64):
    m = model("llama", dtype="float64")
    found = head_scores(m, np.array([[3, 5, 5], [5, 5, 5]]))
    np.testing.assert_array_equal(found.queries, [0, 0])
    np.testing.assert_array_equal(found.repeats, [1, 2])
    np.testing.assert_array_equal(found.induction, 0)
    assert (np.asarray(found.duplicate) > 0).all()


def test_the_induction_model_scores_exactly(x64):
    """G4."""
    tokens = repeated_tokens(0, VOCAB, n=N, batch=3, bos=0)
    found = head_scores(induction_model(), tokens)
    np.testing.assert_allclose(found.previous[0, 0], 1, atol=1e-12)
    np.testing.assert_allclose(found.induction[1, 0], 1, atol=1e-12)
    np.testing.assert_allclose(found.induction[0, 0], 0, atol=1e-12)
    np.testing.assert_allclose(found.duplicate[:, 0], 0, atol=1e-12)


def test_in_float32_and_bfloat16():
    tokens = repeated_tokens(0, 31, n=6, batch=2, bos=0)
    for changes in (dict(), dict(dtype="bfloat16"), dict(stream_dtype="bfloat16")):
        found = head_scores(model("llama", **changes), tokens)
        assert found.induction.dtype == jnp.float32
        assert np.isfinite(found.induction).all() and (np.asarray(found.first) <= 1).all()


def test_a_captured_stream_and_jit_give_the_same():
    m = model("gpt2")
    tokens, mask, _ = batch(vocab=4)
    fresh = head_scores(m, tokens, mask=mask)
    out = run(m, tokens, mask=mask, capture=("pattern",))
    jitted = jax.jit(lambda m, t, k: head_scores(m, t, mask=k))(m, tokens, mask)
    for again in (head_scores(m, out), head_scores(m, out.residuals), jitted):
        for kind in KINDS:
            np.testing.assert_allclose(getattr(again, kind), getattr(fresh, kind), atol=1e-6)


def test_patterns_of_all_layers_never_exist():
    m, tokens = model("llama", n_layers=5), repeated_tokens(0, 31, n=13, batch=2, bos=0)
    t = tokens.shape[1]
    sizes = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.extend(v.aval.size for v in eqn.outvars)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(lambda m, t: head_scores(m, t))(m, tokens).jaxpr)
    assert max(sizes) < 5 * 2 * 6 * t * t


def test_compiles_once():
    m = model("llama")
    tokens, mask, _ = batch(vocab=5)
    head_scores(m, tokens, mask=mask)
    with compilations() as names:
        head_scores(m, np.where(mask, (tokens + 1) % 5, 0), mask=mask[:, ::-1])
    assert names == []


def test_repeated_tokens_never_repeat_by_chance():
    rows = repeated_tokens(3, [4, 9, 2, 7, 9, 0], n=4, batch=50, bos=0)
    assert rows.shape == (50, 9)
    np.testing.assert_array_equal(rows[:, 0], 0)
    np.testing.assert_array_equal(rows[:, 1:5], rows[:, 5:])
    assert {tuple(sorted(row)) for row in rows[:, 1:5]} == {(2, 4, 7, 9)}
    assert len({tuple(row) for row in rows}) > 10
    np.testing.assert_array_equal(
        repeated_tokens(np.random.default_rng(1), 20, n=6, batch=2, bos=5),
        repeated_tokens(1, 20, n=6, batch=2, bos=5),
    )


def test_bad_input():
    m = model("llama")
    out = run(m, np.arange(4)[None], capture=("pattern",)).residuals
    for broken, error, message in [
        (lambda: repeated_tokens(0, 5, n=5, batch=1, bos=0), ValueError,
         r"`n` must be in \[1, 4\], the number of ids but `bos`, got 5"),
        (lambda: repeated_tokens(0, 5, n=2, batch=0, bos=0), ValueError,
         "`batch` must be at least 1, got 0"),
        (lambda: head_scores(m, np.arange(4)[None], definition="abs"), ValueError,
         r"`definition` must be one of \('mean', 'mul'\), got 'abs'"),
        (lambda: head_scores(m, out.example(0)), ValueError,
         r"`residuals` must be a batch, `\[B,T\]`, got one example"),
        (lambda: head_scores(m, run(m, np.arange(4)[None])), ValueError,
         r"`residuals` must be captured with \['pattern'\]"),
        (lambda: head_scores(m, np.arange(4)), ValueError, "`tokens` must be `.B,T.`, of rank 2"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            broken()
