"""Targets: each against its definition from the model's logits, and what the checks refuse."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    KL,
    Continuation,
    Custom,
    Entropy,
    Logit,
    LogProb,
    Prob,
    feature_attribution,
    run,
)
from arrakis_jax.forward.targets import checked_target, read_target
from tests.models import batch, close, compilations, model
from tests.targets import MANY, REFERENCE, weighed

TOKENS, MASK, PROMPTS = batch(lengths=(5, 3))
ROWS = np.arange(2)


def everywhere(logits_BTV):
    return (logits_BTV**2 * jnp.cos(jnp.arange(31))[None, None]).sum((1, 2))


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def entropy(logits):
    log_p = log_softmax(logits)
    return -(np.exp(log_p) * log_p).sum(-1)


def divergence(logits, reference=REFERENCE):
    log_p = log_softmax(reference)
    return (np.exp(log_p) * (log_p - log_softmax(logits))).sum(-1)


# Each target, and what it is of the logits `[B,V]` at its position, which is each row's `at`-th.
KINDS = {
    "logit": (Logit(3), -1, lambda x: x[:, 3]),
    "difference": (Logit([3, 30], against=1), -1, lambda x: x[ROWS, [3, 30]] - x[:, 1]),
    "log_prob": (LogProb([5, 0], position=-2), -2, lambda x: log_softmax(x)[ROWS, [5, 0]]),
    "prob": (Prob(7, position=1), 1, lambda x: np.exp(log_softmax(x))[:, 7]),
    "entropy": (Entropy(position=[-1, -3]), [-1, -3], entropy),
    "kl": (KL(REFERENCE), -1, divergence),
    "kl_of_rows": (
        KL(np.stack([REFERENCE, -REFERENCE]), position=0), 0,
        lambda x: divergence(x, np.stack([REFERENCE, -REFERENCE])),
    ),
    "custom": (Custom(weighed), -1, weighed),
}  # fmt: skip


def values(m, x_BTD, mask, targets):
    return {name: read_target(m, x_BTD, mask, target) for name, target in targets.items()}


read = jax.jit(values)


def checked(m, targets, tokens=TOKENS, mask=MASK):
    mask = None if mask is None else jnp.asarray(mask)
    return {name: checked_target(m, jnp.asarray(tokens), t, mask) for name, t in targets.items()}


def column(n, mask=MASK):
    """The columns of each row's n-th real token."""
    return [np.flatnonzero(row)[i] for row, i in zip(mask, np.broadcast_to(n, 2), strict=True)]


@pytest.mark.parametrize("variant", ["both", "unembed_bias"])
def test_each_target_by_definition(variant, x64):
    """The first of these has soft-capped logits, the second biases on them."""
    m = model(variant, dtype="float64")
    targets = {name: target for name, (target, _, _) in KINDS.items()}
    targets["everywhere"] = Custom(everywhere, position=None)
    for side in ("left", "holes"):
        tokens, mask, _ = batch(lengths=(5, 3), side=side)
        out = run(m, tokens, mask=mask)
        logits = np.asarray(out.logits)
        found = read(m, out.residuals.final, mask, checked(m, targets, tokens, mask))
        for name, (_, at, of) in KINDS.items():
            close(found[name], of(logits[ROWS, column(at, mask)]), 1e-12, name)
        close(found["everywhere"], everywhere(logits), 1e-12)  # zero at padding
    low, high = found["prob"].min(), found["entropy"].max()
    assert 0 < low and high < np.log(31) and found["kl"].min() > 0


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("length", [1, 2, np.array([4, 1]), jnp.array([1, 2])])
def test_a_continuation_is_the_sum_one_token_at_a_time(length, side, x64):
    m = model("both", dtype="float64")
    tokens, mask, _ = batch(lengths=(5, 3), side=side)
    final = run(m, tokens, mask=mask).residuals.final
    found = read(m, final, mask, checked(m, {"it": Continuation(length)}, tokens, mask))["it"]
    expected = np.zeros(2)
    for back in range(1, 5):
        before = mask & (mask[:, ::-1].cumsum(-1)[:, ::-1] > back)
        before[:, 0] |= ~before.any(-1)  # a row that has no such token
        logits = np.asarray(run(m, np.where(mask, tokens, 0), mask=before).logits)
        for b in range(2):
            if back <= np.broadcast_to(length, 2)[b]:
                log_p = log_softmax(logits[b, np.flatnonzero(before[b])[-1]])
                expected[b] += log_p[tokens[b, np.flatnonzero(mask[b])[-back]]]
    close(found, expected, 1e-12)


def test_gradients_by_central_differences(x64):
    m = model("both", dtype="float64")
    final = run(m, TOKENS, mask=MASK).residuals.final
    targets = {name: target for name, (target, _, _) in KINDS.items()}
    targets |= {"everywhere": Custom(everywhere, position=None), "rest": Continuation([4, 1])}
    targets = checked(m, targets)
    step = 1e-5 * np.random.default_rng(0).normal(size=final.shape)
    change = jax.tree.map(
        lambda a, b: (a - b) / 2,
        read(m, final + step, MASK, targets), read(m, final - step, MASK, targets),
    )  # fmt: skip
    sums = jax.jit(
        jax.jacrev(lambda x: {n: v.sum() for n, v in values(m, x, MASK, targets).items()})
    )(final)
    for name, gradient in sums.items():
        expected = (np.asarray(gradient) * step).sum((1, 2))
        np.testing.assert_allclose(change[name], expected, rtol=1e-6, atol=1e-11, err_msg=name)
        assert not np.asarray(gradient)[~MASK].any(), name


def test_padded_equals_one_by_one(x64):
    m = model("both", dtype="float64")
    targets = dict(enumerate((*MANY, Custom(everywhere, position=None))))
    alone = []
    for prompt in PROMPTS:
        final = run(m, prompt[None]).residuals.final
        alone.append(read(m, final, None, checked(m, targets, prompt[None], None)))
    for side in ("left", "right", "both", "holes"):
        tokens, mask, _ = batch(lengths=(5, 3), side=side)
        final = run(m, tokens, mask=mask).residuals.final
        found = read(m, final, mask, checked(m, targets, tokens, mask))
        for b, one in enumerate(alone):
            for i in targets:
                np.testing.assert_allclose(found[i][b], one[i][0], atol=1e-10, err_msg=str(i))


def test_no_divergence_and_no_slope_at_the_reference(x64):
    m = model("both", dtype="float64")
    out = run(m, TOKENS, mask=MASK)
    own = out.logits[:, -1]
    target = checked_target(m, jnp.asarray(TOKENS), KL(own), jnp.asarray(MASK))

    def total(x, target):
        return read_target(m, x, MASK, target).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(out.residuals.final, target)
    assert abs(value) < 1e-12 and np.abs(gradient).max() < 1e-12
    shifted = replace(target, reference=own + 5.0)  # logits of the same distribution
    assert abs(total(out.residuals.final, shifted)) < 1e-12
    sure = jnp.where(jnp.arange(31) == 4, 0, -jnp.inf)[None].repeat(2, 0)
    value, gradient = jax.value_and_grad(total)(
        out.residuals.final, replace(target, reference=sure)
    )
    close(value, -log_softmax(np.asarray(own))[:, 4].sum(), 1e-12)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 1e-3


def test_what_a_row_lacks_is_nan_under_jit(x64):
    m = model("both", dtype="float64")
    final = run(m, TOKENS, mask=MASK).residuals.final

    @jax.jit
    def traced(position, ids):
        targets = {
            "position": Logit(3, position=position),
            "everything": Custom(weighed, position=position),
            "logit": Logit(ids),
            "log_prob": LogProb(ids),
        }
        return values(m, final, MASK, checked(m, targets))

    found = traced(np.array([3, 3]), np.array([31, 30]))
    for name in ("position", "everything"):
        assert np.isnan(found[name]).tolist() == [False, True], name
    for name in ("logit", "log_prob"):
        assert np.isnan(found[name]).tolist() == [True, False], name
    assert np.isnan(traced(np.array([-6, -3]), np.array([-1, 0]))["position"]).tolist() == [1, 0]
    assert np.isnan(traced(np.array([-6, -3]), np.array([-1, 0]))["logit"]).tolist() == [1, 0]


def test_new_ids_positions_references_and_lengths_compile_nothing(x64):
    m = model("both", dtype="float64")
    final = run(m, TOKENS, mask=MASK).residuals.final
    scaled = jax.tree_util.Partial(lambda by, logits: by * logits[:, 0], jnp.ones(()))
    before = [Logit(3, against=1), LogProb(5), Entropy(), KL(REFERENCE), Continuation([2, 1])]
    after = [
        Logit(4, against=[0, 2], position=0), LogProb([5, 8], position=[0, 1]),
        Entropy(position=-2), KL(-REFERENCE, position=1), Continuation([1, 2]),
    ]  # fmt: skip

    def named(targets, own):
        return {type(target).__name__: target for target in targets} | {"own": own}

    found = read(m, final, MASK, checked(m, named(before, Custom(scaled))))
    doubled = Custom(jax.tree_util.Partial(scaled.func, 2 * jnp.ones(())))
    with compilations() as names:
        again = read(m, final, MASK, checked(m, named(after, doubled)))
    assert names == []
    close(again["own"], 2 * found["own"], 1e-12)


def test_ids_a_target_and_a_function_are_the_same_question():
    m = model("both")
    options = dict(method="value_zeroing", mask=MASK)
    by_ids = feature_attribution(m, TOKENS, 3, against=1, **options)
    by_target = feature_attribution(m, TOKENS, Logit(3, against=1), **options)
    np.testing.assert_array_equal(by_ids.tokens, by_target.tokens)
    by_function = feature_attribution(m, TOKENS, lambda x: x[:, 3] - x[:, 1], **options)
    close(by_function.tokens, by_ids.tokens, 1e-4)
    close(by_function.target, by_ids.target, 1e-5)


def test_bad_targets():
    m = model("gpt2")

    def ask(target, **options):
        return checked_target(m, jnp.asarray(TOKENS), target, jnp.asarray(MASK), **options)

    for broken, error, message in [
        (lambda: ask(31), ValueError, r"`target` must be in \[0, 31\), got \[31\]"),
        (lambda: ask(3.5), TypeError, "`target` must be integer token ids, got dtype float64"),
        (lambda: ask("Mary"), TypeError, "`target` must be token ids, a target or a function"),
        (lambda: ask([1, 2, 3]), ValueError, r"`target` must be an int or of shape \(2,\), got"),
        (lambda: ask(3, against=-1), ValueError, r"`against` must be in \[0, 31\), got \[-1\]"),
        (lambda: ask(3, position=3), IndexError, r"`position` must be in \[-3, 3\), got \[3\]"),
        (lambda: ask(3, position=None), TypeError, "`position` must be an array of an int"),
        (lambda: ask(Logit(31)), ValueError, r"`ids` must be in \[0, 31\)"),
        (lambda: ask(Logit(3, against=31)), ValueError, r"`against` must be in \[0, 31\)"),
        (lambda: ask(Entropy(position=0.5)), TypeError, "`position` must be an integer, got"),
        (
            lambda: ask(Logit(3), against=4),
            ValueError,
            "`against` must be left out with a `target` of its own, got 4; it belongs into",
        ),
        (lambda: ask(Entropy(), position=0), ValueError, "`position` must be left out with a"),
        (
            lambda: ask(KL(np.zeros(30))),
            ValueError,
            r"`reference` must be of shape \(31,\) or \(2, 31\), got shape \(30,\)",
        ),
        (lambda: ask(KL(np.full(31, np.nan))), ValueError, "`reference` must be a distribution"),
        (lambda: ask(KL(np.full(31, -np.inf))), ValueError, "`reference` must be a distribution"),
        (lambda: ask(" Mary"), TypeError, "must be token ids, a target or a function of logits"),
        (lambda: ask(Continuation(3)), ValueError, r"`length` must be in \[1, 3\), got \[3\]"),
        (lambda: ask(Continuation(0)), ValueError, r"`length` must be in \[1, 3\), got \[0, 0\]"),
        (lambda: ask(Continuation(1.5)), TypeError, r"`length` must be an int or of shape \(2,\)"),
        (lambda: ask(Continuation([1, 1, 1])), TypeError, "`length` must be an int or of shape"),
        (lambda: ask(Continuation(1, position=0)), ValueError, "`position` must be left out, got"),
        (lambda: ask(Custom(3)), TypeError, "`function` must be callable, got 3"),
        (
            lambda: ask(lambda logits: logits[:, :2]),
            ValueError,
            r"`function` must be a function from \(2, 31\) to \(2,\), got a result .*2, 2",
        ),
        (
            lambda: ask(Custom(lambda logits: logits[..., 0], position=None)),
            ValueError,
            r"`function` must be a function from \(2, 7, 31\) to \(2,\)",
        ),
    ]:
        with pytest.raises(error, match=message):
            broken()
