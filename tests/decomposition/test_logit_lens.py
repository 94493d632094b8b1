"""logit_lens against the whole logits of every point in numpy, and what it holds in memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import Capture, NotCapturedError, Transformer, config_for, run
from arrakis_jax.decomposition import logit_lens as lens
from arrakis_jax.decomposition.logit_lens import logit_lens
from tests.models import KINDS, VARIANTS, batch, chosen, close, compilations, model

TARGETS = np.array([3, 30, 0, 7, 29])
FIELDS = ("logit", "log_prob", "rank", "top_tokens", "top_log_probs", "entropy", "kl")


def by_hand(m, x, targets, k):
    """The lens of one stream point `[...,D]` in numpy float64."""
    c, x = m.config, np.asarray(x, np.float64)
    if m.norm_final is not None:
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
        if m.norm_final.w is not None:
            x = x * (np.asarray(m.norm_final.w[...]) + c.norm_offset)
        if m.norm_final.b is not None:
            x = x + np.asarray(m.norm_final.b[...])
    if m.w_project_out is not None:
        x = x @ np.asarray(m.w_project_out[...])
    z = x @ (np.asarray(m.w_e[...]).T if m.w_u is None else np.asarray(m.w_u[...]))
    z = (z + (0 if m.b_u is None else np.asarray(m.b_u[...]))) * c.logit_scale
    if c.logit_softcap is not None:
        z = c.logit_softcap * np.tanh(z / c.logit_softcap)
    most = z.max(-1, keepdims=True)
    log_p = z - most - np.log(np.exp(z - most).sum(-1, keepdims=True))
    order = np.argsort(-z, -1, kind="stable")[..., :k]
    own = np.take_along_axis(z, targets[..., None], -1)
    found = {
        "logit": own[..., 0],
        "log_prob": np.take_along_axis(log_p, targets[..., None], -1)[..., 0],
        "rank": (z > own).sum(-1),
        "top_tokens": order,
        "top_log_probs": np.take_along_axis(log_p, order, -1),
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
    }
    return found, z, log_p


def points_of(m, r, names):
    return [getattr(r, name) if layer is None else getattr(r, name)[layer] for name, layer in names]


@pytest.mark.parametrize(
    ("variant", "chunk"),
    chosen([*((v, 7) for v in VARIANTS), ("gpt2", None), ("both", 31), ("both", 1),
            ("stream_after", 1)],
           [*((v, 7) for v in KINDS), ("gpt2", None), ("both", 31), ("both", 1)]),
)  # fmt: skip
def test_against_numpy(variant, chunk, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    targets = np.random.default_rng(1).integers(31, size=tokens.shape)
    found = logit_lens(m, tokens, targets, k=4, mask=mask, chunk=chunk)
    out = run(m, tokens, mask=mask, capture="all")
    points = points_of(m, out.residuals, found.points)
    halves = variant not in ("attention_only", "parallel", "shared_norm")
    assert len(points) == m.config.n_layers * (1 + halves) + 1
    _, logits, last = by_hand(m, points[-1], targets, 4)
    np.testing.assert_allclose(out.logits[mask], logits[mask], atol=1e-10)
    for i, point in enumerate(points):
        expected, _, log_p = by_hand(m, point, targets, 4)
        expected["kl"] = (np.exp(last) * (last - log_p)).sum(-1)
        for name in FIELDS:
            value = np.asarray(getattr(found, name))[i]
            scale = 1e-10 * max(1, np.abs(expected[name][mask]).max())
            np.testing.assert_allclose(value[mask], expected[name][mask], atol=scale, err_msg=name)
            assert not value[~mask].any(), name
    np.testing.assert_allclose(found.kl[-1], 0, atol=1e-12)


@pytest.mark.parametrize("group", [2, 3])
def test_several_points_at_once_are_one_after_another(group, monkeypatch, x64):
    """Seven points in groups that leave some over, in four chunks."""
    m = model("gpt2", dtype="float64")
    tokens, mask, _ = batch()
    monkeypatch.setattr(lens, "LOGITS", group * tokens.size * 8)
    monkeypatch.setattr(lens, "_chunk", lambda *_: 8)
    assert lens._group(tokens.size, 8) == group
    found = logit_lens(m, tokens, TARGETS, mask=mask)
    plain = logit_lens(m, tokens, TARGETS, mask=mask, chunk=8)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), atol=1e-12)


def test_the_last_point_is_the_model_itself():
    """In float32, and ranks agree with the model's own logits wherever they are no near ties."""
    for variant in ("both", "stream_after"):
        m = model(variant)
        tokens, mask, _ = batch()
        found = logit_lens(m, tokens, TARGETS, mask=mask, chunk=7, k=31)
        logits = np.asarray(run(m, tokens, mask=mask).logits)
        own = np.take_along_axis(logits, TARGETS[:, None, None], -1)
        close(found.logit[-1], own[..., 0], 1e-6)
        log_p = np.asarray(jax.nn.log_softmax(logits))[mask]
        close(found.top_log_probs[-1][mask], -np.sort(-log_p), 1e-6)
        np.testing.assert_array_equal(found.rank[-1], (logits > own).sum(-1))
        place = (np.asarray(found.top_tokens) == TARGETS[:, None, None]).argmax(-1)
        np.testing.assert_array_equal(found.rank[:, mask], place[:, mask])


def test_equal_logits_have_equal_rank():
    """Tokens of one unembedding, in different chunks, are not larger than one another."""
    m = model("gpt2", tied=False, vocab_size=37)
    w_u = np.array(m.w_u[...])
    w_u[:, [9, 16, 23, 30]] = w_u[:, [2]]
    m.w_u[...] = jnp.asarray(w_u)
    tokens = np.arange(12).reshape(2, 6)
    ranks = [logit_lens(m, tokens, t, chunk=7).rank for t in (2, 9, 16, 23, 30)]
    for rank in ranks[1:]:
        np.testing.assert_array_equal(rank, ranks[0])


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("positions", [None, (-1, 0, 2)])
def test_padded_equals_one_by_one(side, positions, x64):
    m = model("gpt2", dtype="float64")
    tokens, mask, prompts = batch(side=side, lengths=(7, 7, 4, 4, 1))
    found = logit_lens(m, tokens, TARGETS, mask=mask, positions=positions, chunk=7)
    for b, prompt in enumerate(prompts):
        exist = positions and tuple(p for p in positions if p < len(prompt))
        alone = logit_lens(m, prompt[None], TARGETS[b : b + 1], positions=exist)
        held = mask[b] if positions is None else np.array([p < len(prompt) for p in positions])
        for name in FIELDS:
            row = np.asarray(getattr(found, name))[:, b]
            np.testing.assert_allclose(row[:, held], getattr(alone, name)[:, 0], atol=1e-10)
            assert not row[:, ~held].any()


def test_positions_and_captured_streams():
    m = model("llama3")
    tokens, mask, _ = batch()
    whole = logit_lens(m, tokens, TARGETS, mask=mask)
    out = run(m, tokens, mask=mask)
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    places = Capture(("resid_pre", "resid_mid", "final"), positions=(0, -1))
    some = run(m, tokens, mask=mask, capture=places)
    pairs = np.stack([TARGETS, TARGETS], 1)
    for source, options in (
        (tokens, {"positions": (-1,), "mask": mask}),
        (out, {"positions": [-1]}),
        (out.residuals, {}),
        (some, {}),
        (some, {"positions": (-1,)}),
        (some, {"targets": pairs}),
    ):
        found = logit_lens(m, source, **{"targets": TARGETS, **options})
        for name in FIELDS:
            value = np.asarray(getattr(found, name))
            value = value[:, range(5), last] if value.shape[2] == 11 else value[:, :, -1]
            expected = np.asarray(getattr(whole, name))[:, range(5), last]
            if name in ("rank", "top_tokens"):
                np.testing.assert_array_equal(value, expected)
            else:
                close(value, expected, 1e-5)
    with pytest.raises(NotCapturedError, match="`position` must be one of those captured"):
        logit_lens(m, some, positions=(1,))
    with pytest.raises(NotCapturedError, match=r"must be captured with \['resid_mid'\]"):
        logit_lens(m, run(m, tokens, mask=mask, capture=("resid_pre", "final")))


@pytest.mark.parametrize("variant", ["gpt2", "unembed_bias", "both", "stream_after", "scaled"])
def test_a_slice_of_the_unembedding(variant, x64):
    """Traced starts; one too late is moved back."""
    m = model(variant, dtype="float64")
    y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 20)))
    whole = m.unembed(y)
    for start, begin in ((0, 0), (13, 13), (29, 24)):
        part = jax.jit(lambda s: m.unembed(y, s, 7))(start)
        close(part, whole[..., begin : begin + 7], 1e-12)


def test_without_targets_there_are_none():
    found = logit_lens(model("llama"), np.arange(6)[None], k=2)
    assert found.logit is found.log_prob is found.rank is None
    assert found.top_tokens.shape == (7, 1, 6, 2)


@pytest.mark.parametrize("variant", ["llama", "attention_only", "no_norm"])
def test_one_token_one_layer_and_no_layers(variant):
    for n in (0, 1):
        m = model(variant, n_layers=n)
        found = logit_lens(m, np.array([[5]]), 3, k=31, chunk=10)
        assert found.rank.shape == (len(found.points), 1, 1)
        own = run(m, np.array([[5]])).logits[0, 0]
        close(found.logit[-1, 0, 0], own[3], 1e-6)
        assert sorted(np.asarray(found.top_tokens)[-1, 0, 0]) == list(range(31))


def test_jit_grad_and_what_cannot_be_checked():
    m = model("gpt2")
    tokens, mask, _ = batch()
    plain = logit_lens(m, tokens, TARGETS, mask=mask, chunk=7)
    jitted = jax.jit(lambda m, t, k, w: logit_lens(m, t, w, mask=k, chunk=7))
    for a, b in zip(*map(jax.tree.leaves, (jitted(m, tokens, mask, TARGETS), plain)), strict=True):
        close(a, b, 1e-5)

    def total(x, name, chunk):
        found = logit_lens(m, stream_with(x), TARGETS, chunk=chunk)
        return (getattr(found, name) ** 2).sum()

    r = run(m, tokens, mask=mask).residuals
    stream_with = lambda x: jax.tree.map(lambda v: v, replaced(r, x))  # noqa: E731
    for name in ("logit", "log_prob", "entropy", "kl", "top_log_probs"):
        whole, chunked = (jax.grad(total)(r.resid_mid, name, c) for c in (31, 7))
        assert np.isfinite(whole).all()
        close(chunked, whole, 1e-4)
    wrong = jitted(m, tokens, mask, np.array([3, 31, -1, 99, 5]))
    for b, missing in enumerate((False, True, True, True, False)):
        own = np.asarray(wrong.log_prob)[:, b, mask[b]]
        assert (np.isnan(own) if missing else np.isfinite(own)).all()
        assert ((np.asarray(wrong.rank)[:, b, mask[b]] == -1) == missing).all()
    bad = jax.jit(lambda t: logit_lens(m, t, 3, chunk=7))(np.array([[1, 2, 3], [4, 99, 5]]))
    assert np.isfinite(bad.entropy[:, 0]).all() and np.isfinite(bad.kl[:, 0]).all()
    for values in (bad.logit, bad.log_prob, bad.entropy, bad.kl):
        assert np.isnan(values[:, 1, 1]).all() and np.isnan(values[1:, 1, 2]).all()


def replaced(r, x):
    import dataclasses

    return dataclasses.replace(r, resid_mid=x)


def sizes(jaxpr):
    """The sizes of all arrays in a jaxpr."""
    for eqn in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in eqn.outvars)
        for value in jax.tree.leaves(
            tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from sizes(value)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_exist_for_one_point_and_one_chunk(family):
    """At GPT-2 small's shape and Llama's vocabulary, 8 x 128 tokens: never `[B,T,V]`, or more."""
    c = config_for("gpt2", n_layer=4) if family == "gpt2" else config_for(
        "llama", num_hidden_layers=2, hidden_size=768, intermediate_size=2048,
        num_attention_heads=12, num_key_value_heads=12, vocab_size=128256,
    )  # fmt: skip
    m = nnx.eval_shape(lambda: Transformer(c, rngs=nnx.Rngs(0)))
    tokens, v = jax.ShapeDtypeStruct((8, 128), jnp.int32), c.vocab_size
    points = (2 * c.n_layers + 1) * 1024 * 768
    weights = {v * 768, *(math.prod(x.shape) for x in jax.tree.leaves(m))}
    for chunk, most in ((None, 2**24), (4096, 1024 * 4096)):

        def call(m, t, chunk=chunk):
            return logit_lens(m, t, t, chunk=chunk)

        found = set(sizes(jax.make_jaxpr(call)(m, tokens).jaxpr)) - weights
        assert max(found) <= max(most, points) < 1024 * v
        needed = jax.jit(call).lower(m, tokens).compile().memory_analysis().temp_size_in_bytes
        assert needed < 4 * (4 * points + 6 * most)


def test_compiles_once_for_all_targets_and_positions():
    m = model("gpt2")
    tokens, mask, _ = batch()
    logit_lens(m, tokens, TARGETS, mask=mask, positions=(0, -1))
    logit_lens(m, tokens, 5, mask=mask, positions=(0, -1))
    with compilations() as names:
        for targets, positions in ((6, (-1, 0)), (TARGETS[::-1].copy(), (3, 2))):
            logit_lens(m, tokens, targets, mask=mask, positions=positions)
    assert names == []


def test_bad_input():
    m = model("gpt2")
    tokens, mask, _ = batch()
    for options, error, message in [
        ({"targets": 31}, ValueError, r"`targets` must be in \[0, 31\), got \[31\]"),
        ({"targets": [1, 2]}, ValueError, r"`targets` must be an int or of shape \(5,\), got"),
        ({"targets": [[1, 2]]}, ValueError, r"`targets` must be an int or of shape \(5, 11\), got"),
        (
            {"targets": [[1, 2], [3]]},
            TypeError,
            "`targets` must be an array of token ids, got list",
        ),
        ({"targets": 1.5}, TypeError, "`targets` must be integer token ids, got dtype float"),
        ({"k": 0}, ValueError, r"`k` must be an int in \[1, 31\], got 0"),
        ({"chunk": 32}, ValueError, r"`chunk` must be an int in \[1, 31\], got 32"),
        ({"positions": (9,)}, IndexError, r"`positions` must be in \[-9, 9\), got 9"),
        (
            {"positions": 1.0},
            TypeError,
            "`positions` must be a tuple of integers, or None, got 1.0",
        ),
    ]:
        with pytest.raises(error, match=message):
            logit_lens(m, tokens, mask=mask, **options)
    r = run(m, tokens, mask=mask).residuals
    with pytest.raises(ValueError, match="`residuals` must be a batch"):
        logit_lens(m, r.example(0))
    with pytest.raises(ValueError, match="`mask` must be the stream's own, or None"):
        logit_lens(m, r, mask=~mask)
