"""feature_attribution: definitions, literal loops, exact cases, completeness, the stopping rule."""

import functools
import warnings
from dataclasses import FrozenInstanceError, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    GradTimesInput,
    IntegratedGradients,
    Occlusion,
    Saliency,
    Set,
    SmoothGrad,
    Transformer,
    ValueZeroing,
    demo_model,
    encode,
    feature_attribution,
    run,
)
from arrakis_jax.attribution.feature_attribution import FEATURE_METHODS
from arrakis_jax.attribution.integrated_gradients import DOUBLINGS, QUADRATURE_RULES, rule_nodes
from arrakis_jax.attribution.saliency import table_std
from tests.models import batch, chosen, close, compilations, model
from tests.targets import MANY, Sum

LINEAR = dict(
    norm=None, norm_eps=None, activation="identity", gated=False, d_mlp=28, positions=None,
    rope_theta=None,
)  # fmt: skip
FEW = {  # options that make a method quick
    "smooth_grad": dict(samples=3),
    "integrated_gradients": dict(steps=4),
}
# Most tests ask the same of one batch, so that a program serves several of them.
TOKENS, MASK, PROMPTS = batch(lengths=(5, 3))
LAST = [np.flatnonzero(row)[-1] for row in MASK]
ASK = dict(target_ids=3, against=1, mask=MASK)


def attribute(m: Transformer, method: str, tokens=TOKENS, **options):
    return feature_attribution(m, tokens, method=method, **ASK | options)


@functools.cache
def literal(variant: str):
    """A float64 model, its token embeddings, and the target and its gradient as functions of them.

    Written out, and compiled once.
    """
    m, real = model(variant, dtype="float64"), jnp.asarray(MASK)
    e = m.embed_tokens(jnp.where(real, jnp.asarray(TOKENS), 0)) * real[..., None]
    positions = m.embed(jnp.asarray(TOKENS), mask=real) - e

    def total(e):
        logits = m.after_embedding(e + positions, mask=real, capture=("logits",)).logits
        read = logits[jnp.arange(2), jnp.array(LAST)]
        return (read[:, 3] - read[:, 1]).sum(), read[:, 3] - read[:, 1]

    both = jax.jit(jax.grad(total, has_aux=True))
    return m, e, lambda e: both(e)[1], lambda e: both(e)[0]


def by_hand(variant, nodes, weights):
    """Integrated gradients from the mean embedding, and the target's change, written out."""
    m, e, value, gradient = literal(variant)
    base = m.w_e[...].mean(0)[None, None] * jnp.asarray(MASK)[..., None]
    mean = sum(w * gradient(base + a * (e - base)) for a, w in zip(nodes, weights, strict=True))
    return ((e - base) * mean).sum(-1), value(e) - value(base)


def frozen(m):
    """Uniform attention: queries of zero."""
    m.blocks.attn.w_q[...] = jnp.zeros_like(m.blocks.attn.w_q[...])
    return m


@pytest.mark.parametrize("variant", chosen(["gpt2", "both"], ["both"]))
def test_saliency_and_grad_x_input_by_definition(variant, x64):
    m, e, value, gradient = literal(variant)
    gradient = gradient(e)
    saliency = attribute(m, "saliency")
    close(saliency.tokens, jnp.linalg.norm(gradient, axis=-1), 1e-12)
    product = attribute(m, "grad_x_input")
    # Measured by their parts: their sum all but vanishes where a norm reads the embedding alone.
    parts = np.asarray(gradient * e)
    rounding = 1e-12 * np.abs(parts).sum(-1).max()
    assert np.abs(np.asarray(product.tokens) - parts.sum(-1)).max() <= rounding
    close(product.target, value(e), 1e-12)
    n = m.config.n_layers
    assert product.layers.shape == saliency.layers.shape == (n + 1, *MASK.shape)
    if m.w_pos is None:
        assert np.abs(np.asarray(product.layers[0] - product.tokens)).max() <= rounding
    if variant == "gpt2":
        final = run(m, TOKENS, mask=MASK).residuals.final
        read = m.unembedding(jnp.array(3)) - m.unembedding(jnp.array(1))
        at_final = jax.grad(
            lambda x: (m.final_norm(x) @ read)[jnp.arange(2), jnp.array(LAST)].sum()
        )
        close(saliency.layers[-1], jnp.linalg.norm(at_final(final), axis=-1), 1e-12)
        close(attribute(m, "saliency", norm="l1").tokens, jnp.abs(gradient).sum(-1), 1e-12)
        signed = attribute(m, "saliency", norm="signed")
        np.testing.assert_array_equal(signed.tokens, product.tokens)
        np.testing.assert_array_equal(signed.layers, product.layers)


def test_smooth_grad_against_a_loop(x64):
    m, e, _, gradient = literal("gpt2")
    table = m.embed_tokens(jnp.arange(31))
    close(table_std(m), jnp.std(table), 1e-12)

    def expected(sigma, seed):
        total = 0
        for sample in range(3):
            noise = np.zeros(e.shape)
            for b, t in np.argwhere(MASK):
                nth = MASK[b, :t].sum()
                key = jax.random.fold_in(jax.random.key(seed), sample)
                noise[b, t] = jax.random.normal(jax.random.fold_in(key, nth), (20,), jnp.float64)
            total = total + gradient(e + sigma * jnp.std(table) * noise) / 3
        return total

    found = attribute(m, "smooth_grad", samples=3)
    assert (found.layers, found.gap, found.steps) == (None, None, None)
    close(found.tokens, jnp.linalg.norm(expected(0.15, 0), axis=-1), 1e-10)
    other = attribute(m, "smooth_grad", samples=3, noise=0.3, seed=7)
    close(other.tokens, jnp.linalg.norm(expected(0.3, 7), axis=-1), 1e-10)
    still = attribute(m, "smooth_grad", samples=3, noise=0)
    close(still.tokens, attribute(m, "saliency").tokens, 1e-12)


@pytest.mark.parametrize("rule", QUADRATURE_RULES)
def test_integrated_gradients_against_the_sum_written_out(rule, x64):
    nodes = {
        "left": [0, 1 / 4, 2 / 4, 3 / 4],
        "right": [1 / 4, 2 / 4, 3 / 4, 1],
        "midpoint": [1 / 8, 3 / 8, 5 / 8, 7 / 8],
        "trapezoid": [0, 1 / 4, 2 / 4, 3 / 4, 1],
        "gauss_legendre": [(1 + x) / 2 for x in np.polynomial.legendre.leggauss(4)[0]],
    }[rule]
    weights = {
        "trapezoid": [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8],
        "gauss_legendre": np.polynomial.legendre.leggauss(4)[1] / 2,
    }.get(rule, [1 / 4] * 4)
    expected, change = by_hand("gpt2", nodes, weights)
    m, e, value, _ = literal("gpt2")
    found = attribute(m, "integrated_gradients", steps=4, rule=rule)
    close(found.tokens, expected, 1e-12)
    close(found.target, value(e), 1e-12)
    close(found.delta, expected.sum(-1) - change, 1e-9)
    close(found.gap, jnp.abs(expected.sum(-1) - change) / jnp.abs(expected).sum(-1), 1e-9)
    assert found.steps.tolist() == [4, 4] and found.layers is None


def test_the_error_falls_at_the_rules_order(x64):
    """Of the path integral of one model: 1 for left and right, 2 for midpoint and trapezoid."""

    def error(rule, n):
        shares, change = by_hand("gpt2", *rule_nodes(rule, n))
        return np.abs(shares.sum(-1) - change).max()

    for rule, order in (("left", 1), ("right", 1), ("midpoint", 2), ("trapezoid", 2)):
        assert np.log2(error(rule, 64) / error(rule, 128)) == pytest.approx(order, abs=0.1), rule
    assert error("gauss_legendre", 32) < 1e-2 * error("midpoint", 128)
    assert error("gauss_legendre", 64) < 1e-12
    for rule in QUADRATURE_RULES:
        for n in (1, 2, 9):
            node, weight = rule_nodes(rule, n)
            assert weight.sum() == pytest.approx(1, abs=1e-15)
            # Exact for polynomials of this degree, and not of the next.
            degree = {"left": 0, "right": 0, "gauss_legendre": 2 * n - 1}.get(rule, 1)
            for k in range(degree + 1):
                assert (weight * node**k).sum() == pytest.approx(1 / (k + 1), abs=1e-13)
            assert abs((weight * node ** (degree + 1)).sum() - 1 / (degree + 2)) > 1e-13


def test_in_a_linear_network_all_methods_agree(x64):
    """G8: with a zero baseline, and for any rule, number of steps and noise."""
    m = frozen(model(**LINEAR, dtype="float64"))
    product = attribute(m, "grad_x_input")
    zero = dict(baseline="zero")
    for rule, steps in (("left", 1), ("trapezoid", 3)):
        path = attribute(m, "integrated_gradients", rule=rule, steps=steps, **zero)
        close(path.tokens, product.tokens, 1e-12)
        assert path.gap.max() < 1e-12
    close(path.tokens.sum(-1), path.target, 1e-12)
    close(attribute(m, "occlusion", **zero).tokens, product.tokens, 1e-12)
    for noise in (0.15, 40.0):
        smooth = attribute(m, "smooth_grad", samples=3, noise=noise, norm="signed")
        close(smooth.tokens, product.tokens, 1e-12)


def test_bilinear_gate_needs_one_node(x64):
    """G9: a quadratic path is integrated exactly by the midpoint, a sixth degree by three nodes."""
    plain = dict(norm=None, norm_eps=None, dtype="float64")
    one = frozen(model("bilinear", n_layers=1, **plain))
    path = functools.partial(attribute, method="integrated_gradients")
    assert path(one, steps=1, rule="midpoint").gap.max() < 1e-12
    two = frozen(model("bilinear", n_layers=2, **plain))
    assert path(two, steps=1).gap.max() > 1e-6
    assert path(two, steps=2).gap.max() < 1e-12


def test_steps_are_doubled_row_by_row_until_the_gap_is_small(x64):
    m = literal("llama")[0]
    levels = {}
    for n in DOUBLINGS[:3]:
        shares, change = by_hand("llama", *rule_nodes("gauss_legendre", n))
        levels[n] = shares, np.abs(shares.sum(-1) - change) / np.abs(shares).sum(-1)
    for tolerance, steps in ((None, [32, 64]), (1e-5, [64, 64]), (7e-6, [64, 128])):
        found = attribute(m, "integrated_gradients", tolerance=tolerance)
        assert found.steps.tolist() == steps
        for b, n in enumerate(steps):
            shares, gap = levels[n]
            assert gap[b] <= (tolerance or 1e-3)
            assert n == 32 or levels[n // 2][1][b] > (tolerance or 1e-3)
            close(found.tokens[b], shares[b], 1e-10)
            assert found.gap[b] == pytest.approx(gap[b], abs=1e-13)
    with pytest.warns(UserWarning, match=r"512 steps leave a gap above 0 in rows \[.*\] \(larg"):
        found = attribute(m, "integrated_gradients", tolerance=0)
    assert found.steps.max() == 512 and found.gap.max() < 1e-12


def lost(m, edit):
    """The literal loop: what each real token's edit takes from the target."""

    def value(edits):
        logits = run(m, TOKENS, mask=MASK, edits=edits).logits[np.arange(2), LAST]
        return logits[:, 3] - logits[:, 1]

    expected = np.zeros(MASK.shape)
    for n in range(5):
        change = value(()) - value((edit(n),))
        for b in range(2):
            if n < MASK[b].sum():
                expected[b, np.flatnonzero(MASK[b])[n]] = change[b]
    assert np.abs(expected[MASK]).min() > 1e-4
    return expected


def test_occlusion_against_a_loop_of_edits(x64):
    m = model("gpt2", dtype="float64")
    base = m.w_e[...].mean(0)

    def edit(n):
        return Set("embed", base + m.embed_positions(jnp.array(n)), position=n)

    close(attribute(m, "occlusion").tokens, lost(m, edit), 1e-10)
    early = attribute(m, "occlusion", position=0).tokens
    first = np.array([np.flatnonzero(row)[0] for row in MASK])
    assert np.abs(early[np.arange(2), first]).min() > 1e-3  # and what comes later does nothing
    assert not np.asarray(early.at[np.arange(2), first].set(0)).any()


def test_value_zeroing_against_a_loop_of_edits(x64):
    m = model("both", dtype="float64")
    expected = lost(m, lambda n: Set("v", 0.0, position=n))
    close(attribute(m, "value_zeroing").tokens, expected, 1e-10)


def test_baselines_of_every_kind(x64):
    m = model("gpt2", dtype="float64")
    rng = np.random.default_rng(3)
    other = np.where(MASK, rng.integers(31, size=MASK.shape), 10**6)  # garbage at padding
    table = m.embed_tokens(jnp.arange(31))

    def found(baseline):
        return attribute(m, "occlusion", baseline=baseline).tokens

    close(found("mean"), found(None), 0)
    close(found(table.mean(0)), found(None), 1e-12)
    close(found("zero"), found(np.zeros(20)), 0)
    close(found(7), found(table[7]), 1e-12)
    embeddings = np.where(MASK[..., None], table[np.where(MASK, other, 0)], np.nan)
    close(found(other), found(embeddings), 1e-12)
    row = rng.normal(size=(7, 20))
    close(found(row), found(np.stack([row, row])), 1e-12)
    assert np.abs(found(7) - found(None)).max() > 1e-3

    path = attribute(m, "integrated_gradients", baseline=other, steps=32)
    close(path.tokens.sum(-1), path.target - attribute(m, "saliency", other).target, 1e-5)
    same = attribute(m, "integrated_gradients", baseline=np.where(MASK, TOKENS, 0), steps=32)
    assert not np.asarray(same.tokens).any() and not np.asarray(same.gap).any()


def test_a_zero_baseline_is_warned_of_where_it_is_singular():
    def ask(m, method="integrated_gradients", **options):
        jax.eval_shape(lambda m: attribute(m, method, **options), m)  # checked, and not run

    m, path = model("llama"), dict(steps=1)
    zeros = np.ones((*MASK.shape, 20))
    zeros[1, LAST[1]] = 0
    for baseline in ("zero", np.zeros(20), jnp.zeros((7, 20))):
        with pytest.warns(UserWarning, match="zero baseline in a model with RMSNorm"):
            ask(m, baseline=baseline, **path)
    with pytest.warns(UserWarning, match="zero baseline in a model with RMSNorm"):
        attribute(m, "integrated_gradients", baseline=zeros, **path)
    attribute(m, "integrated_gradients", baseline=np.where(MASK[..., None], np.ones(20), 0), **path)
    ask(m, "occlusion", baseline="zero")
    ask(model("gpt2"), baseline="zero", **path)


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_padded_equals_one_by_one(method, x64):
    m = model("gpt2", dtype="float64")
    options = FEW.get(method, {})
    alone = [
        feature_attribution(m, prompt[None], 3, against=1, method=method, **options)
        for prompt in PROMPTS
    ]
    for side in ("left", "right", "both", "holes"):
        tokens, mask, _ = batch(lengths=(5, 3), side=side)
        found = attribute(m, method, tokens, mask=mask, **options)
        for b, one in enumerate(alone):
            np.testing.assert_allclose(found.tokens[b, mask[b]], one.tokens[0], atol=1e-10)
            np.testing.assert_allclose(found.target[b], one.target[0], atol=1e-10)
            if found.layers is not None:
                np.testing.assert_allclose(
                    found.layers[:, b, mask[b]], one.layers[:, 0], atol=1e-10
                )
            if found.gap is not None:
                np.testing.assert_allclose(found.gap[b], one.gap[0], atol=1e-10)
        for name in ("tokens", "layers", "input_ids"):
            values = getattr(found, name)
            assert values is None or not np.asarray(values)[..., ~mask].any(), name


@pytest.mark.parametrize(
    "method", chosen(["grad_x_input", "integrated_gradients"], ["grad_x_input"])
)
def test_padded_equals_one_by_one_for_every_target(method, x64):
    """For a weighted sum of all kinds, of which none must stand out."""
    m = model("both", dtype="float64")
    options = dict(method=method, **FEW.get(method, {}))
    found = feature_attribution(m, TOKENS, Sum(MANY), mask=MASK, **options)
    for b, prompt in enumerate(PROMPTS if method == "grad_x_input" else PROMPTS[:1]):
        one = feature_attribution(m, prompt[None], Sum(MANY), **options)
        np.testing.assert_allclose(found.tokens[b, MASK[b]], one.tokens[0], atol=1e-10)
        np.testing.assert_allclose(found.target[b], one.target[0], atol=1e-10)
    assert not np.asarray(found.tokens)[~MASK].any()


@pytest.mark.parametrize(
    "method, options",
    [
        ("smooth_grad", dict(samples=3)),
        ("integrated_gradients", dict(steps=4)),
        ("integrated_gradients", {}),
        ("value_zeroing", {}),
    ],
)
def test_nothing_depends_on_how_many_are_run_at_once(method, options, x64):
    m = model("llama" if options == {} else "gpt2", dtype="float64")
    one = attribute(m, method, **options)
    some = attribute(m, method, step_batch=2 if method == "smooth_grad" else 3, **options)
    close(some.tokens, one.tokens, 1e-10)


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_one_compilation(method, x64):
    """New ids, tokens, positions, baselines, tolerances, noise and seeds compile nothing."""
    m = model("gpt2", dtype="float64")
    few = FEW.get(method, {})
    attribute(m, method, **few)
    new = {
        "smooth_grad": dict(noise=2, seed=5),
        "integrated_gradients": dict(baseline=np.ones(20)),
        "occlusion": dict(baseline=np.ones(20)),
    }.get(method, {})
    if "baseline" in new:
        attribute(m, method, baseline=np.full(20, 0.5), **few)
    with compilations() as names:
        attribute(
            m, method, 30 - TOKENS, target_ids=np.arange(2), against=[4, 5], position=0,
            mask=MASK & (np.arange(7) > 2), **few | new,
        )  # fmt: skip
    assert names == []


def test_a_new_tolerance_compiles_nothing(x64):
    m = model("llama", dtype="float64")
    attribute(m, "integrated_gradients")
    with compilations() as names:
        attribute(m, "integrated_gradients", tolerance=1)
    assert names == []


@pytest.mark.parametrize("method", chosen(["smooth_grad", "integrated_gradients"], ["smooth_grad"]))
def test_jit_of_vmap(method, x64):
    m = model("llama" if method == "integrated_gradients" else "gpt2", dtype="float64")
    options = {"smooth_grad": dict(samples=3)}.get(method, {})

    def one(t, k):
        return attribute(m, method, t[None], mask=k[None], **options).tokens[0]

    found = jax.jit(jax.vmap(one))(jnp.asarray(TOKENS), jnp.asarray(MASK))
    close(found, attribute(m, method, **options).tokens, 1e-10)


def test_the_result_can_be_differentiated():
    m = model("gpt2")
    gradient = jax.grad(
        lambda m: attribute(m, "integrated_gradients", steps=4, step_batch=3).tokens[0, 2]
    )(m)
    assert np.isfinite(gradient.w_e[...]).all() and np.abs(gradient.w_e[...]).max() > 0


def test_the_largest_tokens_and_the_table():
    m, tokenizer = demo_model()
    tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
    found = feature_attribution(m, tokens, 3, mask=mask, method="occlusion")
    values = np.asarray(found.tokens)
    value, index = found.top(3)
    assert value.shape == index.shape == (3, 2)
    order = np.argsort(-np.abs(values[0]))[:3]
    np.testing.assert_array_equal(index[:, 0], order)
    np.testing.assert_array_equal(value[:, 0], values[0, order])
    length = mask[1].sum()
    assert mask[1][np.asarray(index[:length, 1])].all() and not np.asarray(value[length:, 1]).any()
    nothing = replace(found, tokens=jnp.zeros_like(found.tokens)).top(length).index[:, 1]
    assert mask[1][np.asarray(nothing)].all()
    with pytest.raises(ValueError, match=r"`k` must be an int in \[1, 4\], got 5"):
        found.top(5)

    ids, texts = found.to_table(), found.to_table(tokenizer)
    rows, columns = np.nonzero(mask)
    assert list(ids) == ["row", "position", "token", "attribution"]
    assert ids["row"] == rows.tolist() and ids["position"] == columns.tolist()
    assert ids["token"] == tokens[mask].tolist()
    np.testing.assert_array_equal(ids["attribution"], values[mask])
    assert texts["token"][-6:] == ["<bos>", " Alice", " and", " Tom", "<bos>", " Lucy"]
    assert "the target with the baseline in place" in found.meaning
    for method, norm, meaning in (
        ("saliency", "l2", "the Euclidean norm of the target's gradient"),
        ("smooth_grad", "l1", "the sum of the absolute entries of the target's gradient"),
        ("grad_x_input", None, "the product of the token's embedding and the target's gradient"),
    ):
        assert replace(found, method=method, norm=norm).meaning.startswith(meaning)
    assert {
        replace(found, method=method).meaning for method in FEATURE_METHODS
    } and found.norm is None


def test_bad_input():
    m = model("gpt2")
    tokens = np.arange(4)[None]

    def call(method="grad_x_input", ids=tokens, target=3, **options):
        return feature_attribution(m, ids, target, method=method, **options)

    path = functools.partial(call, "integrated_gradients")
    smooth = functools.partial(call, "smooth_grad")
    for broken, error, message in [
        (lambda: call("lime"), ValueError, "`method` must be one of .* got 'lime'"),
        (lambda: call(target=31), ValueError, r"`target_ids` must be in \[0, 31\), got \[31\]"),
        (lambda: call(ids=tokens + 0.5), TypeError, "`input_ids` must be integers, got dtype"),
        (lambda: call(ids=tokens[0]), ValueError, "`input_ids` must be .* of rank 2, got shape"),
        (
            lambda: call(steps=4),
            ValueError,
            "`steps` must be None with method='grad_x_input', got 4; "
            "leave it out, or choose method='integrated_gradients'",
        ),
        (
            lambda: call("saliency", baseline="mean"),
            ValueError,
            "`baseline` must be None with .* method='integrated_gradients' or 'occlusion'",
        ),
        (lambda: call(norm="l1"), ValueError, "`norm` must be None with method='grad_x_input'"),
        (lambda: path(norm="l1"), ValueError, "choose method='saliency' or 'smooth_grad'"),
        (lambda: call("occlusion", seed=1), ValueError, "`seed` must be None with"),
        (lambda: call("value_zeroing", baseline=1), ValueError, "`baseline` must be None with"),
        (lambda: call("saliency", step_batch=2), ValueError, "`step_batch` must be None with"),
        (lambda: smooth(tolerance=1), ValueError, "`tolerance` must be None with"),
        (lambda: path(noise=1), ValueError, "`noise` must be None with"),
        (lambda: path(rule="simpson"), ValueError, "`rule` must be one of .* got 'simpson'"),
        (lambda: smooth(norm="max"), ValueError, "`norm` must be one of .* got 'max'"),
        (lambda: path(steps=0), ValueError, "`steps` must be a positive int or None, got 0"),
        (lambda: path(step_batch=True), ValueError, "`step_batch` must be a positive int, got"),
        (lambda: smooth(samples=2.0), ValueError, "`samples` must be a positive int, got 2.0"),
        (lambda: smooth(noise=-1), ValueError, "`noise` must be a number, 0 or more, got -1"),
        (lambda: smooth(noise="big"), ValueError, "`noise` must be a number, 0 or more, got 'big'"),
        (lambda: smooth(seed=0.5), ValueError, r"`seed` must be an int in \[0, 2\^32\)"),
        (lambda: path(tolerance=np.nan), ValueError, "`tolerance` must be a number, 0 or more"),
        (
            lambda: path(steps=4, tolerance=1e-4),
            ValueError,
            "`tolerance` must be None with `steps`, got 0.0001",
        ),
        (
            lambda: path(baseline=np.zeros(3)),
            ValueError,
            r"`baseline` must be of shape \(20,\).* got shape \(3,\)",
        ),
        (
            lambda: path(baseline=np.zeros(20, int)),
            ValueError,
            r"`baseline` must be one token id, or ids of the tokens' shape \(1, 4\), got shape",
        ),
        (lambda: path(baseline=31), ValueError, r"`baseline` must be in \[0, 31\), got"),
        (lambda: path(baseline=tokens + 28), ValueError, r"`baseline` must be in \[0, 31\) at"),
        (lambda: path(baseline="pad"), TypeError, "`baseline` must be 'mean', 'zero', token ids"),
        (lambda: path(baseline=np.full(20, np.inf)), ValueError, "`baseline` must be finite"),
    ]:
        with pytest.raises(error, match=message), warnings.catch_warnings():
            broken()


AS_VALUES = [
    ("saliency", Saliency, dict(norm="l1")),
    ("grad_x_input", GradTimesInput, {}),
    ("smooth_grad", SmoothGrad, dict(norm="signed", samples=3, noise=0.3, seed=7)),
    ("integrated_gradients", IntegratedGradients, dict(steps=4, rule="left", baseline="zero")),
    ("integrated_gradients", IntegratedGradients, dict(tolerance=1.0)),
    ("occlusion", Occlusion, dict(baseline=5, step_batch=2)),
    ("value_zeroing", ValueZeroing, dict(step_batch=2)),
]


@pytest.mark.parametrize("name, method, options", AS_VALUES)
def test_a_method_as_a_value_is_its_name_with_options(name, method, options):
    m = model("gpt2")
    value, named = attribute(m, method(**options)), attribute(m, name, **options)
    assert jax.tree.structure(value) == jax.tree.structure(named) and value.method == name
    jax.tree.map(np.testing.assert_array_equal, value, named)


def test_every_method_is_a_value_with_the_defaults_of_its_name():
    assert {name for name, _, _ in AS_VALUES} == set(FEATURE_METHODS)
    assert all(FEATURE_METHODS[name] is method for name, method, _ in AS_VALUES)
    m = model("gpt2")
    tolerances = [attribute(m, IntegratedGradients(tolerance=t)).steps for t in (None, 1e-3)]
    np.testing.assert_array_equal(*tolerances)
    assert attribute(m, Saliency()).norm == "l2"
    with pytest.raises(FrozenInstanceError):
        Saliency().norm = "l1"


def test_methods_as_values_refuse_what_does_not_fit():
    m = model("gpt2")
    for broken, error, message in [
        (lambda: Saliency(norm="max"), ValueError, "`norm` must be one of .* got 'max'"),
        (lambda: Saliency(steps=4), TypeError, "steps"),
        (lambda: SmoothGrad(samples=2.0), ValueError, "`samples` must be a positive int, got 2.0"),
        (lambda: SmoothGrad(noise=-1), ValueError, "`noise` must be a number, 0 or more, got -1"),
        (lambda: SmoothGrad(seed=0.5), ValueError, r"`seed` must be an int in \[0, 2\^32\)"),
        (lambda: IntegratedGradients(rule="simpson"), ValueError, "`rule` must be one of"),
        (lambda: IntegratedGradients(steps=0), ValueError, "`steps` must be a positive int or Non"),
        (
            lambda: IntegratedGradients(steps=4, tolerance=1e-4),
            ValueError,
            "`tolerance` must be None with `steps`, got 0.0001",
        ),
        (lambda: Occlusion(step_batch=True), ValueError, "`step_batch` must be a positive int"),
        (
            lambda: attribute(m, Occlusion(baseline=np.zeros(3))),
            ValueError,
            r"`baseline` must be of shape \(20,\).* got shape \(3,\)",
        ),
        (
            lambda: attribute(m, IntegratedGradients(), steps=4),
            ValueError,
            r"`steps` must be left out with method=IntegratedGradients\(...\), got 4; "
            r"write method=IntegratedGradients\(steps=...\)",
        ),
        (
            lambda: attribute(m, Saliency(), steps=4),
            ValueError,
            r"`steps` must be left out with method=Saliency\(...\), got 4; it has no such option",
        ),
        (lambda: attribute(m, Saliency), ValueError, "`method` must be one of"),
    ]:
        with pytest.raises(error, match=message):
            broken()
