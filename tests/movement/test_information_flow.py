"""information_flow against the literal [T,T,H,D] arrays, in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import NotCapturedError, logit_attribution, run
from arrakis_jax.frozen.attention import Brought
from arrakis_jax.movement import contributions
from arrakis_jax.movement.information_flow import FLOW_METHODS, TO_LOGITS, information_flow
from tests.cost import arrays, flops
from tests.models import batch, chosen, close, compilations, gpt2_small, model
from tests.movement.brute import alone, brought, logits, nearness, own_rows, raw

PLAIN = tuple(name for name in FLOW_METHODS if name not in TO_LOGITS)
TARGETS, AGAINST = np.array([3, 30, 0, 7, 7]), np.array([4, 2, 9, 1, 30])
KINDS = (
    "llama", "gpt2", "no_norm", "attention_only", "one_layer", "post", "both", "post_layernorm",
    "parallel", "shared_norm", "stream_after", "stream_before", "stream_mixed", "stream_rms",
    "scaled", "moe", "mixed", "gpt_oss",
)  # fmt: skip


def row(x, b, mask):
    """`[...,B,T,S]` of one prompt: real rows and columns."""
    x = np.asarray(x)[..., b, :, :]
    return x[..., mask[b], :][..., mask[b]]


def arguments(method):
    return (TARGETS, {"against": AGAINST}) if method in TO_LOGITS else (None, {})


@pytest.mark.parametrize("variant", chosen(KINDS))
def test_against_all_vectors(variant, x64):
    """Every layer's rows and sums, and their product."""
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side="both")
    r = run(m, tokens, mask=mask, capture="all").residuals
    every = variant in ("llama", "gpt_oss", "post_layernorm")
    for method in PLAIN if every else ("mixing", "alti"):
        found = information_flow(m, r, method=method, layers=True)
        assert (found.mixing_ratio is not None) == (method == "mixing")
        np.testing.assert_allclose(found.tokens.sum(-1), mask, atol=1e-12)
        assert not np.asarray(found.tokens).swapaxes(1, 2)[~mask].any() and not found.empty.any()
        for b, prompt in enumerate(prompts):
            flow, eye = np.eye(len(prompt)), np.eye(len(prompt))
            for i, layer in enumerate(brought(m, alone(r, b))):
                c = raw(layer, method)
                flow = own_rows(c) @ flow
                close(row(found.layers[i], b, mask), own_rows(c), 1e-10)
                close(np.asarray(found.total)[i, b, mask[b]], c.sum(-1), 1e-10)
                if method == "mixing":
                    phi = layer.f.sum(2)
                    others = np.linalg.norm((phi * (1 - eye)[..., None]).sum(1), axis=-1)
                    ratio = others / (others + np.diagonal(c))
                    at = np.asarray(found.mixing_ratio)[i, b, mask[b]]
                    np.testing.assert_allclose(at, ratio, atol=1e-10)
            close(row(found.tokens, b, mask), flow, 1e-10)


@pytest.mark.parametrize("variant", chosen(KINDS))
def test_logits_against_all_vectors(variant, x64):
    """The published form and ours; ours and its constant are the model's logit."""
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side="both")
    r = run(m, tokens, mask=mask, capture="all").residuals
    rng = np.random.default_rng(1)
    targets = rng.integers(31, size=mask.shape)
    against = (targets + rng.integers(1, 31, size=mask.shape)) % 31
    args = (m, r, targets)
    found = information_flow(*args, method="alti_logit", against=against, layers=True)
    ours = information_flow(*args, method="alti_logit_complete", against=against)
    assert found.constant is None and found.total is None and ours.layers is None
    logit = logit_attribution(*args, against=against, position=None).logit
    close(ours.tokens.sum(-1) + ours.constant, logit, 1e-12)
    for b, prompt in enumerate(prompts):
        at = alone(r, b)
        layers = brought(m, at)
        t = len(prompt)
        u = np.asarray(m.unembedding(targets[b, mask[b]]) - m.unembedding(against[b, mask[b]]))
        q, embed, mlps = logits(m, layers, at, u)
        flow, published, complete = np.eye(t), np.zeros((t, t)), np.diag(embed)
        for i, layer in enumerate(layers):
            close(row(found.layers[i], b, mask), q[i], 1e-10)
            published, complete = published + q[i] @ flow, complete + q[i] @ flow
            before, flow = flow, own_rows(raw(layer, "alti")) @ flow
            complete = complete + mlps[i][:, None] * (before if m.config.parallel else flow)
        close(row(found.tokens, b, mask), published, 1e-10)
        close(row(ours.tokens, b, mask), complete, 1e-10)
    for x in (found.tokens, ours.tokens, ours.constant):
        assert not np.asarray(x)[~mask].any()


@pytest.mark.parametrize("blocks", [True, False])
def test_blocks_of_any_size(blocks, monkeypatch, x64):
    """Also those that do not divide the length, and causal ones that are left out."""
    rng = np.random.default_rng(0)
    b, t, h, k, d = 2, 11, 3, 4, 5
    if blocks:
        monkeypatch.setattr(contributions, "HEAD_ELEMENTS", b * h * d * 3)
        monkeypatch.setattr(contributions, "PAIR_ELEMENTS", b * d * h * 7)
    a = np.tril(rng.random((b, h, t, t)))
    v, w_o, own = (rng.normal(size=s) for s in ((b, t, h, k), (h, k, d), (b, t, d)))
    share = rng.random((b, t))
    f = np.einsum("bhts,bshk,hkd,bt->btshd", a, v, w_o, share)
    y = f.sum((2, 3)) + own
    arrays = [jnp.asarray(x) for x in (a, v, w_o, share, own, y, f.sum((2, 3)), 0 * y)]
    brings = Brought(*arrays)
    phi = f.sum(3)
    close(contributions.brought_norms(brings), np.linalg.norm(phi, axis=-1), 1e-12)
    close(contributions.brought_nearness(brings, arrays[5]), nearness(phi, y[:, :, None]), 1e-12)
    by_head = contributions.brought_nearness(brings, arrays[5], by_head=True)
    close(by_head, nearness(f, y[:, :, None, None]), 1e-12)
    close(contributions.to_itself(brings), np.einsum("bttd->btd", phi), 1e-12)


def test_rollout_of_known_patterns(x64):
    """Of the identity the identity; of strictly causal uniform patterns the product by hand."""
    m, t = model("llama", dtype="float64"), 5
    r = run(m, np.arange(t)[None], capture="all").residuals
    eye = np.eye(t)
    for method in ("rollout", "attention"):
        same = replace(r, pattern=jnp.broadcast_to(eye, r.pattern.shape))
        np.testing.assert_allclose(information_flow(m, same, method=method).tokens[0], eye)
    strict = np.tril(np.ones((t, t)), -1) / np.maximum(np.arange(t), 1)[:, None]
    uniform = replace(r, pattern=jnp.broadcast_to(strict, r.pattern.shape))
    found = information_flow(m, uniform, method="rollout")
    by_hand = np.array([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 4, 1 / 4, 1 / 2]])
    three = np.linalg.matrix_power(by_hand, 3)
    np.testing.assert_allclose(found.tokens[0, :3, :3], three, atol=1e-12)
    np.testing.assert_allclose(three[2], [11 / 16, 3 / 16, 1 / 8])
    assert not found.empty.any()
    found = information_flow(m, uniform, method="attention", layers=True)
    assert found.empty[0].tolist() == [True, False, False, False, False]
    np.testing.assert_allclose(found.layers[0, 0], strict, atol=1e-12)
    assert not found.tokens[0, 0].any() and np.isfinite(found.tokens).all()


def test_uniform_attention_and_one_that_sees_itself_alone(x64):
    """Of the models themselves: no queries, and a window of one."""
    m, t = model("relu", dtype="float64"), 4
    m.blocks.attn.w_q[...] = jnp.zeros_like(m.blocks.attn.w_q[...])
    uniform = np.tril(np.ones((t, t))) / np.arange(1, t + 1)[:, None]
    found = information_flow(m, np.arange(t)[None], method="rollout")
    by_hand = np.linalg.matrix_power((uniform + np.eye(t)) / 2, 3)
    np.testing.assert_allclose(found.tokens[0], by_hand, atol=1e-12)
    m = model("llama", dtype="float64", window=1)
    for method in PLAIN:
        found = information_flow(m, np.arange(t)[None], method=method)
        np.testing.assert_allclose(found.tokens[0], np.eye(t), atol=1e-12)
    mixed = information_flow(m, np.arange(t)[None], method="mixing").mixing_ratio
    np.testing.assert_allclose(mixed, 0, atol=1e-12)


def test_what_nothing_contributes_to_is_told_and_stays_in_the_sum(x64):
    """A bias that outweighs all parts: rows of ALTI are empty, and the constant has the rest."""
    m = model("gpt2", dtype="float64")
    tokens, mask, _ = batch()
    m.blocks.attn.b_o[...] = (
        m.blocks.attn.b_o[...].at[1].set(jnp.where(jnp.arange(20) % 2 == 0, 40.0, -40.0))
    )
    found = information_flow(m, tokens, 3, method="alti_logit_complete", mask=mask)
    logit = logit_attribution(m, tokens, 3, position=None, mask=mask).logit
    close(found.tokens.sum(-1) + found.constant, logit, 1e-12)
    alti = information_flow(m, tokens, mask=mask, layers=True)
    empty = ((np.asarray(alti.total) == 0) & mask).any(0)
    assert empty.any() and (np.asarray(found.empty) == empty).all()
    np.testing.assert_allclose(alti.layers.sum(-1), (alti.total > 0) * mask[None], atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("variant", ["gpt2", "gpt_oss"])
def test_padded_equals_one_by_one(variant, side, x64):
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side=side, lengths=(5, 7, 1))
    for method in ("mixing", "alti_logit_complete") if variant == "gpt2" else ("rollout",):
        to = (lambda i: TARGETS[i]) if method in TO_LOGITS else (lambda i: None)
        options = {"method": method, "layers": True}
        found = information_flow(m, tokens, to(np.arange(3)), mask=mask, **options)
        for b, prompt in enumerate(prompts):
            one = information_flow(m, prompt[None], to([b]), **options)
            for name in ("tokens", "layers"):
                np.testing.assert_allclose(
                    row(getattr(found, name), b, mask), getattr(one, name)[..., 0, :, :], atol=1e-10
                )
            for name in ("empty", "total", "mixing_ratio", "constant"):
                if getattr(one, name) is not None:
                    at = np.asarray(getattr(found, name))[..., b, :][..., mask[b]]
                    np.testing.assert_allclose(at, getattr(one, name)[..., 0, :], atol=1e-10)


@pytest.mark.parametrize("method", ["rollout", "mixing", "alti_logit_complete"])
def test_run_captured_and_in_a_callers_jit(method):
    m = model("stream_after" if method in TO_LOGITS else "mixed")
    tokens, mask, _ = batch()
    targets, options = arguments(method)

    def flow(source, mask=None):
        return information_flow(
            m, source, targets, mask=mask, method=method, layers=True, **options
        )

    found = flow(tokens, mask)
    out = run(m, tokens, mask=mask, capture="all")
    for again in (flow(out), flow(out.residuals, mask), jax.jit(flow)(tokens, mask)):
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
            close(a, b, 1e-4)
    short = information_flow(m, tokens, targets, mask=mask, method=method, **options)
    assert short.layers is None and short.total is None
    close(short.tokens, found.tokens, 1e-5)


def test_compiles_once_for_all_targets():
    m = model()
    tokens, mask, _ = batch()

    def flow(t, targets, against):
        return information_flow(m, t, targets, against=against, mask=mask, method="alti_logit")

    flow(tokens, TARGETS, AGAINST)
    with compilations() as names:
        flow(tokens[:, ::-1].copy() % 31, TARGETS[::-1].copy(), np.array([1, 2, 3, 4, 5]))
    assert names == []
    each = flow(tokens, np.broadcast_to(TARGETS[:, None], mask.shape), 4)
    close(each.tokens, flow(tokens, TARGETS, 4 + 0 * TARGETS).tokens, 1e-6)


def test_one_token_and_no_layer(x64):
    m, none = (model("gpt2", dtype="float64", n_layers=n) for n in (1, 0))
    for method in ("rollout", "mixing", "alti", "alti_logit_complete"):
        targets = 3 if method in TO_LOGITS else None
        for n in (m, none):
            found = information_flow(n, [[5]], targets, method=method, layers=True)
            assert found.layers.shape == (n.config.n_layers, 1, 1, 1)
            if method in PLAIN:
                np.testing.assert_allclose(found.tokens, 1, atol=1e-12)
            elif found.constant is not None:
                logit = logit_attribution(n, [[5]], 3).logit
                np.testing.assert_allclose(found.tokens.sum() + found.constant[0], logit)


def test_gradients_are_finite():
    m, tokens = model("llama"), np.arange(5)[None]
    r = run(m, tokens, capture="all").residuals
    for method in ("mixing", "alti_logit_complete"):
        targets = 3 if method in TO_LOGITS else None

        def total(v, method=method, targets=targets):
            flow = information_flow(m, replace(r, v=v), targets, method=method).tokens
            return (flow[..., -1, :] ** 2).sum()

        gradient = jax.grad(total)(r.v.at[:, :, 2].set(0))
        assert np.isfinite(gradient).all() and np.asarray(gradient).any()


@pytest.mark.parametrize("method", ["value_weighted", "mixing", "alti", "alti_logit_complete"])
def test_no_vector_exists_for_every_pair_of_positions(method, monkeypatch):
    """Norms: none at all. ALTI: only those of a block, of the size that was set."""
    b, t, d = 2, 130, 20
    monkeypatch.setattr(contributions, "PAIR_ELEMENTS", b * d * 1000)
    m, tokens = model("llama"), jax.ShapeDtypeStruct((b, t), jnp.int32)
    targets = 3 if method in TO_LOGITS else None
    jaxpr = jax.make_jaxpr(lambda t: information_flow(m, t, targets, method=method))(tokens)
    largest = max(arrays(jaxpr.jaxpr))
    assert largest <= b * t * t * 6  # that of the pattern


def test_what_heads_bring_exists_for_a_block_of_positions(monkeypatch):
    b, t, h, k, d = 2, 16, 6, 4, 500
    monkeypatch.setattr(contributions, "HEAD_ELEMENTS", 2 * b * h * d)
    shapes = ((b, h, t, t), (b, t, h, k), (h, k, d), (b, t), *[(b, t, d)] * 4)
    brings = Brought(*[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    jaxpr = jax.make_jaxpr(contributions.brought_norms)(brings)
    assert max(arrays(jaxpr.jaxpr)) == 2 * b * h * d


def test_value_weighted_costs_little_more_than_a_forward():
    """At GPT-2 small shape, 8 x 128 tokens: 1.15 forwards without unembedding at most."""
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    forward = 12 * 8 * 128 * (24 * 768**2 + 4 * 128 * 768)
    most = {"attention": 1.01, "rollout": 1.01, "value_weighted": 1.11, "mixing": 1.2}
    for method, times in most.items():
        cost = flops(lambda m, t, method=method: information_flow(m, t, method=method), m, tokens)
        assert 1 < cost / forward <= times, method


def test_bad_input():
    m, tokens = model(), np.arange(4)[None]
    with pytest.raises(ValueError, match="`method` must be one of .*got 'flow'"):
        information_flow(m, tokens, method="flow")
    with pytest.raises(ValueError, match="`targets` must be None with method='alti'"):
        information_flow(m, tokens, 3)
    with pytest.raises(ValueError, match="`against` must be None with method='alti'"):
        information_flow(m, tokens, against=3)
    with pytest.raises(ValueError, match="`targets` must be token ids with method='alti_logit'"):
        information_flow(m, tokens, method="alti_logit")
    with pytest.raises(ValueError, match=r"`targets` must be an int or of shape \(1,\)"):
        information_flow(m, tokens, [3, 4], method="alti_logit")
    with pytest.raises(ValueError, match=r"`against` must be in \[0, 31\)"):
        information_flow(m, tokens, 3, against=99, method="alti_logit")
    with pytest.raises(TypeError, match="`layers` must be True or False, got 2"):
        information_flow(m, tokens, layers=2)
    with pytest.raises(NotCapturedError, match="'pattern'"):
        information_flow(m, run(m, tokens))
    with pytest.raises(ValueError, match="must be a batch"):
        information_flow(m, run(m, tokens, capture="all").residuals.example(0))
