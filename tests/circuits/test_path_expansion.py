"""G7: all paths sum to the logit, and a virtual head is the difference that a replacement makes."""

import jax
import numpy as np
import pytest

from arrakis_jax import run
from arrakis_jax.circuits.path_expansion import Path, path_expansion
from arrakis_jax.circuits.virtual_head import virtual_head
from tests.models import batch, chosen, close, compilations, model

TARGETS, AGAINST = np.array([3, 30, 0, 7, 7]), np.array([4, 2, 9, 1, 30])
ONLY = dict(n_layers=2, d_mlp=0, gated=False, mlp_bias=False, activation="identity")
MODELS = {  # attention only but for the last few
    "llama": ("llama", ONLY),
    "no_norm": ("no_norm", ONLY),
    "biases": ("attention_only", ONLY | dict(qkv_bias=True)),
    "gpt2": ("gpt2", ONLY),
    "post": ("post", ONLY),
    "both": ("both", ONLY | dict(window_layers=(True, False))),
    "post_layernorm": ("post_layernorm", ONLY),
    "parallel": ("parallel", ONLY),
    "shared_norm": ("shared_norm", ONLY),
    "bare_norm": ("bare_norm", ONLY),
    "scaled": ("scaled", ONLY | dict(clip_qkv=None)),
    "unembed_bias": ("unembed_bias", ONLY),
    "one_layer": ("gpt2", ONLY | dict(n_layers=1)),
    "with_mlp": ("post_layernorm", dict(n_layers=2)),
    "parallel_mlp": ("parallel", dict(n_layers=2)),
    "gpt_oss": ("gpt_oss", dict(n_layers=2, window_layers=(True, False))),
    "mixed": ("mixed", dict(n_layers=2, moe_layers=(False, True))),
}


def made(name, **changes):
    variant, own = MODELS[name]
    return model(variant, **own | dict(dtype="float64") | changes)


@pytest.mark.parametrize(
    "name", chosen(MODELS, ["llama", "gpt2", "both", "post_layernorm", "parallel", "with_mlp"])
)
def test_all_paths_sum_to_the_logit(name, x64):
    m = made(name)
    tokens, mask, _ = batch(side="holes")
    logits = np.asarray(run(m, tokens, mask=mask).logits)
    if m.config.logit_softcap:
        c = m.config.logit_softcap
        logits = c * np.arctanh(logits / c)
    for position in (-1, 0):
        found = path_expansion(m, tokens, TARGETS, against=AGAINST, position=position, mask=mask)
        assert len(found.labels) == len(found.terms)
        for b in range(5):
            row = logits[b, np.flatnonzero(mask[b])[position]]
            own = row[TARGETS[b]] - row[AGAINST[b]]
            np.testing.assert_allclose(found.terms[:, b].sum() + found.constant[b], own, atol=1e-11)
        assert found.gap.max() < 1e-12


def written(m, pattern, x, into, out, layer, head):
    """What one head writes for stream `x [B,T,D]`, with a given pattern and scales of norms."""
    cfg, attn, blocks = m.config, m.blocks.attn, m.blocks
    if blocks.norm_attn is not None:
        x = x - x.mean(-1, keepdims=True) if cfg.norm == "layernorm" else x
        gain = 1 if blocks.norm_attn.w is None else np.asarray(blocks.norm_attn.w[...])[layer]
        x = x / into[..., None] * (gain + cfg.norm_offset)
    v = x @ np.asarray(attn.w_v[...])[layer, :, head // (cfg.n_heads // cfg.n_kv_heads)]
    y = pattern @ v @ np.asarray(attn.w_o[...])[layer, head]
    if blocks.norm_attn_out is not None:
        y = y - y.mean(-1, keepdims=True) if cfg.norm == "layernorm" else y
        y = y / out[..., None] * (np.asarray(blocks.norm_attn_out.w[...])[layer] + cfg.norm_offset)
    return y * cfg.residual_scale


@pytest.mark.parametrize("name", ["llama", "gpt2", "both", "post", "post_layernorm", "parallel",
                                  "scaled", "no_norm", "with_mlp"])  # fmt: skip
def test_a_virtual_head_is_the_difference_that_a_replacement_makes(name, x64):
    """Layer 1's values without what a head of layer 0 wrote of the embedding; the rest frozen."""
    m = made(name, **dict(n_layers=3) if name in ("llama", "gpt2", "with_mlp") else {})
    tokens, mask, _ = batch(side="holes")
    r = run(m, tokens, mask=mask, capture="all").residuals
    pattern, x = np.asarray(r.pattern), np.asarray(r.resid_pre)
    ones = np.ones(pattern.shape[:2] + mask.shape[1:])
    into = ones if r.norm_attn_scale is None else np.asarray(r.norm_attn_scale)
    out = ones if r.norm_attn_out_scale is None else np.asarray(r.norm_attn_out_scale)
    for first, second in [((0, 1), (1, 4)), ((0, 5), (-1, 2)), ((-2, 3), (-1, 0))]:
        i, j = first[0] % m.config.n_layers, second[0] % m.config.n_layers
        share = written(m, pattern[i, :, first[1]], x[i], into[i], out[i], i, first[1])
        after = (pattern[j, :, second[1]], into[j], out[j], j, second[1])
        whole = written(m, after[0], x[j], *after[1:])
        without = written(m, after[0], x[j] - share, *after[1:])
        found = virtual_head(m, tokens, first=first, second=second, mask=mask)
        own = np.asarray(found.weight) @ x[i] @ np.asarray(found.ov.expand())
        np.testing.assert_allclose(own, whole - without, atol=1e-11)
        np.testing.assert_allclose(
            found.pattern, pattern[j, :, second[1]] @ pattern[i, :, first[1]], atol=1e-12
        )
    assert (np.asarray(found.pattern)[~mask] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "both", "post_layernorm"])
def test_each_path_equals_its_virtual_head_and_its_heads(name, x64):
    m = made(name, positions=None, rope_theta=None, window_rope_theta=None, rotary_dim=None)
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask, capture="all")
    r = out.residuals
    found = path_expansion(m, out, TARGETS)
    u = m.unembedding(TARGETS)
    gained = u if m.norm_final is None else m.norm_final.centre(m.norm_final.gained(u))
    read = np.asarray(gained) / np.asarray(r.norm_final_scale)[:, -1, None]
    assert found.sources == ("embed", "bias")
    for first, second in ((0, 5), (3, 3), (4, 1)):
        pair = virtual_head(m, out, first=(0, first), second=(1, second))
        own = pair.weight[:, -1:] @ r.embed @ pair.ov.expand()
        np.testing.assert_allclose(
            found.virtual[0, first, second], (own[:, 0] * read).sum(-1), atol=1e-11
        )
    # All paths that end in a head of layer 1 are what this head writes.
    ends = found.heads[1].sum(0) + found.virtual.sum((0, 1))
    w_o = np.asarray(m.blocks.attn.w_o[...])[1]
    y = np.einsum("BHK,HKD->HBD", r.z[1, :, -1], w_o)
    if m.blocks.norm_attn_out is not None:
        norm = jax.tree.map(lambda w: w[1], m.blocks.norm_attn_out)
        y = norm.gained(norm.centre(y)) / r.norm_attn_out_scale[1, None, :, -1, None]
    close(ends, (np.asarray(y) * read).sum(-1), 1e-11)


def test_without_layers_only_the_embedding_writes(x64):
    m = model("gpt2", n_layers=0, dtype="float64", scale_by_inverse_layer=False)
    tokens, mask, _ = batch()
    found = path_expansion(m, tokens, TARGETS, mask=mask)
    assert found.sources == ("embed", "pos", "bias", "mlp")
    assert found.virtual is None and found.gap.max() < 1e-12
    close(found.direct[:2].sum(0) + found.constant, found.logit, 1e-12)


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
def test_padded_equals_one_by_one(side, x64):
    m = made("gpt2")
    tokens, mask, prompts = batch(side=side)
    found = path_expansion(m, tokens, TARGETS, mask=mask)
    pair = virtual_head(m, tokens, first=(0, 1), second=(1, 2), mask=mask)
    for b, prompt in enumerate(prompts):
        alone = path_expansion(m, prompt[None], int(TARGETS[b]))
        np.testing.assert_allclose(found.terms[:, b], alone.terms[:, 0], atol=1e-10)
        one = virtual_head(m, prompt[None], first=(0, 1), second=(1, 2))
        np.testing.assert_allclose(pair.weight[b][mask[b]][:, mask[b]], one.weight[0], atol=1e-10)


def test_a_captured_stream_jit_and_float32():
    m = made("gpt2", dtype="float32")
    tokens, mask, _ = batch()
    fresh = path_expansion(m, tokens, TARGETS, mask=mask)
    assert fresh.gap.max() < 1e-5
    out = run(m, tokens, mask=mask, capture="all")
    jitted = jax.jit(lambda m, t, k: path_expansion(m, t, TARGETS, mask=k))(m, tokens, mask)
    for again in (path_expansion(m, out, TARGETS), jitted):
        close(again.terms, fresh.terms, 1e-4)
    pair = virtual_head(m, tokens, first=(0, 1), second=(1, 2), mask=mask)
    close(virtual_head(m, out, first=(0, 1), second=(1, 2)).weight, pair.weight, 1e-5)
    traced = jax.jit(lambda i, h: virtual_head(m, out, first=(i, h), second=(1, 2)).weight)
    close(traced(-2, 1), pair.weight, 1e-5)
    absent = jax.jit(lambda p: path_expansion(m, tokens, 3, position=p, mask=mask).direct)(5)
    np.testing.assert_array_equal(np.isnan(absent[0]), mask.sum(-1) <= 5)
    half = made("gpt2", dtype="bfloat16")
    assert path_expansion(half, tokens, TARGETS, mask=mask).gap.max() < 1e-4


def test_labels_and_the_largest_paths():
    m = made("llama", dtype="float32")
    found = path_expansion(m, np.arange(6)[None], 3)
    assert found.sources == ("embed", "bias")
    assert [str(found.labels[i]) for i in (0, 2, -1)] == [
        "embed", "embed > L0 head 0", "bias > L0 head 5 > L1 head 5",
    ]  # fmt: skip
    where = found.labels.index(Path("embed", ((0, 4), (1, 2))))
    np.testing.assert_array_equal(found.terms[where], found.virtual[0, 4, 2])
    where = found.labels.index(Path("embed", ((1, 3),)))
    np.testing.assert_array_equal(found.terms[where], found.heads[1, 0, 3])
    value, index = found.top(5)
    np.testing.assert_array_equal(np.take_along_axis(found.terms, index, 0), value)
    assert np.abs(value[-1]) >= np.sort(np.abs(found.terms), 0)[-5]


def test_compiles_once():
    m = made("gpt2", dtype="float32")
    tokens, mask, _ = batch()
    path_expansion(m, tokens, 3, mask=mask)
    virtual_head(m, tokens, first=(0, 1), second=(1, 2), mask=mask)
    with compilations() as names:
        path_expansion(m, tokens, TARGETS, position=0, mask=mask)
        virtual_head(m, tokens, first=(0, 3), second=(1, 5), mask=mask)
    assert names == []


def test_bad_input():
    m, t = made("llama", dtype="float32"), np.arange(4)[None]
    out = run(m, t)
    for broken, error, message in [
        (lambda: path_expansion(model("llama"), t, 3), ValueError,
         "`model` must be of at most 2 layers, got 3; decompose by head and by source"),
        (lambda: path_expansion(model("stream_after", n_layers=2), t, 3), ValueError,
         "`model` must be one whose stream is a plain sum, got one with norm_placement='stream_"),
        (lambda: virtual_head(model("scaled"), t, first=(0, 0), second=(1, 0)), ValueError,
         "got one with clip_qkv=0.8"),
        (lambda: path_expansion(m, t, 31), ValueError, r"`targets` must be in \[0, 31\), got"),
        (lambda: path_expansion(m, t, 3, against=99), ValueError, "`against` must be in"),
        (lambda: path_expansion(m, t, 3, position=4), IndexError, "`position` must be in"),
        (lambda: path_expansion(m, out, 3), ValueError, r"must be captured with \['pattern'\]"),
        (lambda: path_expansion(m, t, 3).top(0), ValueError, r"`k` must be an int in \[1, "),
        (lambda: virtual_head(m, t, first=(1, 0), second=(1, 2)), ValueError,
         "`second` must be in a layer after that of `first`, 1, got layer 1"),
        (lambda: virtual_head(m, t, first=(0, 6), second=(1, 2)), IndexError,
         r"`first\[1\]` must be in \[-6, 6\), got 6"),
        (lambda: virtual_head(m, t, first=(0, 0), second=(2, 2)), IndexError,
         r"`second\[0\]` must be in \[-2, 2\), got 2"),
        (lambda: virtual_head(m, t, first=3, second=(1, 2)), ValueError,
         r"`first` must be \(layer, head\), got 3"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            broken()
