"""attribute_to and attribute_movement: terms along a direction, and of a movement."""

from functools import partial
from itertools import product

import jax
import numpy as np
import pytest

from arrakis_jax import (
    NotCapturedError,
    attribute_movement,
    attribute_to,
    capture_for,
    decompose,
    logit_attribution,
    run,
)
from tests.decomposition.points import points
from tests.models import VARIANTS, WAYS, batch, chosen, close, model


@pytest.mark.parametrize("variant", chosen(VARIANTS, ["gpt2", "both", "stream_after", "mixed"]))
def test_terms_sum_to_the_product_at_every_point(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    u = np.random.default_rng(0).normal(size=20).astype(np.float32)
    for at, x in points(out.residuals, m.config.n_layers):
        found = attribute_to(m, out, u, at=at, by="source")
        assert found.gap.max() < 1e-5, at
        close(found.value, np.asarray(x) @ u, 2e-5)
        scale = np.abs(found.terms).sum(0).max()
        np.testing.assert_allclose(found.terms.sum(0), found.value, atol=1e-5 * scale)


@pytest.mark.parametrize(
    "variant",
    chosen(["llama3", "gpt2", "both", "parallel", "shared_norm", "mixed", "bare_norm",
            "stream_before"], ["gpt2", "both", "shared_norm", "mixed"]),
)  # fmt: skip
def test_what_a_neuron_and_a_head_read_is_explained(variant, x64):
    """Through the norm of the reader: the terms and the constant are its input's product."""
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    rng = np.random.default_rng(0)
    block, layers = m.stacks()[-1]
    layer, row = layers.stop - 1, len(layers) - 1
    u = rng.normal(size=20)
    readers = [("attn", ("resid_pre", layer), block.norm_attn)]
    if not m.config.shared_norm:
        point = "resid_pre" if m.config.parallel else "resid_mid"
        readers.append(("mlp", (point, layer), block.norm_mlp))
    for through, at, norm in readers:
        x = np.asarray(getattr(out.residuals, at[0])[layer])
        if m.config.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + m.config.norm_eps)
        gain = 1.0 if norm.w is None else np.asarray(norm.w[...][row]) + m.config.norm_offset
        bias = 0.0 if norm.b is None else np.asarray(norm.b[...][row])
        expected = np.where(mask, (x / scale * gain + bias) @ u, 0)
        for source in (out, tokens):
            kwargs = {} if source is out else {"mask": mask}
            found = attribute_to(m, source, u, at=at, through=through, by="head", **kwargs)
            close(found.value, expected, 1e-10)
            close(found.terms.sum(0) + found.constant, expected, 1e-10)
            assert found.gap.max() < 1e-12
        with pytest.raises(ValueError, match=r"`through` must be one of \(None, .* got 'final'"):
            attribute_to(m, tokens, u, at=at, through="final", mask=mask)


def test_a_logit_is_a_direction_through_the_final_norm(x64):
    m = model("unembed_bias", dtype="float64")
    tokens, mask, _ = batch()
    u = m.unembedding(np.array(7)) - m.unembedding(np.array(4))
    found = attribute_to(m, tokens, u, through="final", by="head", mask=mask)
    logit = logit_attribution(m, tokens, 7, against=4, by="head", position=None, mask=mask)
    close(found.terms, logit.terms, 1e-11)
    close(found.by_head(), logit.by_head(), 1e-11)


def test_many_directions_and_one_per_position(x64):
    m = model("both", dtype="float64")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    many = np.random.default_rng(0).normal(size=(3, 20))
    found = attribute_to(m, out, many, at=("resid_pre", 2), through="attn", by="head")
    assert found.terms.shape == (len(found.labels), 5, 11, 3) and found.value.shape == (5, 11, 3)
    each = np.broadcast_to(many[1], (5, 11, 20))
    own = attribute_to(m, out, each, at=("resid_pre", 2), through="attn", by="head")
    for i, u in enumerate(many):
        one = attribute_to(m, out, u, at=("resid_pre", 2), through="attn", by="head")
        close(found.terms[..., i], one.terms, 1e-12)
        close(found.value[..., i], one.value, 1e-12)
        if i == 1:
            close(own.terms, one.terms, 1e-12)
            close(own.constant, one.constant, 1e-12) if one.constant.any() else None
    at = attribute_to(
        m, tokens, many, by="head", positions=(-1,), kinds=("head",), layers=(1, 2), mask=mask
    )
    assert at.terms.shape == (2 * 6, 5, 1, 3)
    everywhere = attribute_to(m, tokens, many, mask=mask)
    for b in range(5):
        close(at.value[b, 0], everywhere.value[b, np.flatnonzero(mask[b])[-1]], 1e-12)
    table = attribute_to(m, out, many, by="head").to_table(2)
    assert table["direction"][:4] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("variant", "by"), chosen(product(VARIANTS, ["component", "source", "neuron"]), WAYS)
)
def test_a_movement_is_split_exactly(variant, by):
    m = model(variant)
    if by == "neuron" and not (m.config.d_mlp or m.config.n_experts):
        pytest.skip("no neurons")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    every = list(points(out.residuals, m.config.n_layers))[1:] + [("final", out.residuals.final)]
    for i, j in ((0, -1), (1, -1), (1, 3), (2, 4)):
        if j > len(every) - 1 or i >= (j % len(every)):
            continue
        (start, a), (end, b) = every[i], every[j]
        if np.array_equal(a, b):
            continue
        found = attribute_movement(m, out, start, end, by=by)
        assert found.gap.max() < 2e-5, (start, end)
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        close(found.distance, np.linalg.norm(b - a, axis=-1), 1e-5)
        np.testing.assert_allclose(found.terms.sum(0)[mask], 1, atol=1e-3)
        grown = (b**2).sum(-1) - (a**2).sum(-1)
        scale = np.abs(found.growth).sum(0).max()
        np.testing.assert_allclose(found.growth.sum(0), grown, atol=2e-5 * scale)
        assert not np.asarray(found.terms)[:, ~mask].any()


@pytest.mark.parametrize(
    "variant",
    chosen(["gpt2", "stream_before", "stream_after", "mixed"], ["gpt2", "stream_after"]),
)
def test_only_what_is_between_the_points_moves_it(variant, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    r = out.residuals
    found = attribute_movement(m, out, ("resid_mid", 0), ("resid_mid", 2))
    kinds = [(label.layer, label.kind) for label in found.labels if label.kind != "norm_bias"]
    extra = [(None, "norm")] if m.config.norms_stream else []
    assert kinds == [*extra, (0, "mlp"), (1, "attn"), (1, "mlp"), (2, "attn")]
    delta = np.asarray(r.resid_mid[2] - r.resid_mid[0])
    if not extra:
        written = [r.mlp_out[0], r.attn_out[1], r.mlp_out[1], r.attn_out[2]]
        for term, x in zip(found.terms, written, strict=True):
            share = (np.asarray(x) * delta).sum(-1)[mask] / (delta**2).sum(-1)[mask]
            close(np.asarray(term)[mask], share, 1e-10)
    ran = attribute_movement(m, tokens, ("resid_mid", 0), ("resid_mid", 2), mask=mask)
    close(ran.terms, found.terms, 1e-10)
    last = attribute_movement(m, tokens, 0, positions=(-1,), mask=mask)
    whole = attribute_movement(m, tokens, 0, by="component", mask=mask)
    for b in range(5):
        where = np.flatnonzero(mask[b])[-1]
        close(last.terms[:, b, 0], whole.terms[:, b, where], 1e-10)


def test_jit_and_missing_fields():
    m = model("gpt2")
    tokens, mask, _ = batch()
    u = np.ones(20, np.float32)
    plain = attribute_to(m, tokens, u, at=("resid_mid", 1), through="mlp", mask=mask).terms
    jitted = jax.jit(
        lambda m, t, u: attribute_to(m, t, u, at=("resid_mid", 1), through="mlp", mask=mask).terms
    )
    close(jitted(m, tokens, u), plain, 1e-5)
    out = run(m, tokens, mask=mask, capture=capture_for("component"))
    with pytest.raises(NotCapturedError, match="'resid_mid', 'norm_mlp_scale'"):
        attribute_to(m, out, u, at=("resid_mid", 1), through="mlp")
    with pytest.raises(NotCapturedError, match="'resid_pre'"):
        attribute_movement(m, out, 0, 1)


def test_bad_input():
    m = model("gpt2")
    tokens = np.arange(6)[None]
    u = np.ones(20, np.float32)
    to = partial(attribute_to, m, tokens)
    moved = partial(attribute_movement, m, tokens)
    for call, error, message in [
        (lambda: to(u[:5]), ValueError, r"`direction` must be `\[20\]`, .* \(5,\)"),
        (lambda: to(np.ones((2, 6, 20))), ValueError, r"got shape \(2, 6, 20\)"),
        (lambda: to("a"), TypeError, "`direction` must be real numbers"),
        (lambda: to(np.arange(20)), TypeError, "`direction` must be real numbers"),
        (lambda: to(u, at="end"), ValueError, "`at` must be 'final' or"),
        (lambda: to(u, through="norm"), ValueError, "`through` must be one of"),
        (lambda: to(u, by="layer"), ValueError, "`by` must be one of"),
        (lambda: moved(1, 1), ValueError, "`end` must be a point after start=1"),
        (lambda: moved(2, 1), ValueError, "`end` must be a point after start=2"),
        (lambda: moved("final"), ValueError, "`end` must be a point after"),
        (lambda: moved("first"), ValueError, "`start` must be 'final' or"),
        (lambda: moved(7), IndexError, r"`layer` must be in \[-3, 3\), got 7"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert decompose(m, tokens, kinds=("attn",)).terms.shape[0] == 3
