"""G6: one layer's attention and logits are look-ups in tables."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import run
from arrakis_jax.circuits.bigrams import bigram_logits, top_bigrams
from arrakis_jax.circuits.head_tables import ov_table, qk_table, skip_trigrams
from tests.models import batch, close, compilations, model

ONE = dict(n_layers=1, d_mlp=0, gated=False, mlp_bias=False, out_bias=False, activation="identity")
ONE |= dict(dtype="float64")
IDS = np.array([4, 0, 30, 4, 17])


@pytest.mark.parametrize("variant", ["no_norm", "llama", "gpt2", "unembed_bias", "parallel",
                                     "bare_norm", "both", "attention_only"])  # fmt: skip
def test_one_layer_is_a_look_up(variant, x64):
    """G6: softmax of QK entries is the pattern; direct rows and A times OV rows are the logits."""
    extra = dict(norm_placement="pre", qk_norm=None, window=None, window_layers=None,
                 window_rope_theta=None, attention_softcap=None, logit_softcap=None)  # fmt: skip
    m = model(variant, **ONE | (extra if variant == "both" else {}))
    tokens, mask, prompts = batch(lengths=(9, 6), side="holes")
    out = run(m, tokens, mask=mask, capture="all")
    learned = m.w_pos is not None
    for b, prompt in enumerate(prompts):
        t, where = len(prompt), np.flatnonzero(mask[b])
        at = np.arange(t) if learned else None
        s_f = 1.0
        if m.norm_final is not None:
            s_f = np.asarray(out.residuals.norm_final_scale)[b, where]
        logits = np.array(bigram_logits(m, prompt, positions=at, scale=s_f))
        for head in range(6):
            scores = np.full((t, t), -np.inf)
            for distance in range(t):
                table = qk_table(m, (0, head), prompt, prompt, distance=distance,
                                 destination_positions=at, source_positions=at)  # fmt: skip
                q = np.arange(distance, t)
                scores[q, q - distance] = np.asarray(table)[q, q - distance]
            a = np.asarray(jax.nn.softmax(scores))
            close(a, out.residuals.pattern[0, b, head][where][:, where], 1e-11)
            rows = ov_table(m, (0, head), prompt, positions=at)
            logits += a @ np.asarray(rows) / np.reshape(s_f, (-1, 1))
        close(logits, out.logits[b, where], 1e-11)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixed", "stream_rms", "tied"])
def test_tables_of_weights_alone_are_literal_products(variant, x64):
    m = model(variant, dtype="float64", qkv_bias=False, norm_bias=False, rope_theta=None,
              **dict(positions=None))  # fmt: skip
    config = m.config
    flat = [jax.tree.map(lambda w, i=i: np.asarray(w[i]), blocks)
            for blocks, layers in m.stacks() for i in range(len(layers))]  # fmt: skip

    def centred(x):
        return x - x.mean(-1, keepdims=True) if config.norm == "layernorm" else x

    e, u = np.asarray(m.embed_tokens(np.arange(31))), np.asarray(m.unembedding())
    for layer, head in ((1, 4), (-1, 0), (0, 5)):
        block = flat[layer]
        g = head // (6 // config.n_kv_heads)
        gain = np.asarray(block.norm_attn.w[...])
        after = variant == "stream_rms"
        x = e if after else centred(e) * gain
        y = x @ block.attn.w_v[...][:, g] @ block.attn.w_o[...][head]
        y = centred(y) * gain if after else y
        if m.norm_final is not None:
            y = centred(y) * np.asarray(m.norm_final.w[...])
        y = y * config.residual_scale
        close(ov_table(m, (layer, head), IDS, scales="one"), (y @ u.T)[IDS], 1e-12)
        scale = 4**-0.5 / ((layer % 3 + 1) if config.scale_by_inverse_layer else 1)
        qk = x @ block.attn.w_q[...][:, head] @ block.attn.w_k[...][:, g].T @ x.T * scale
        close(qk_table(m, (layer, head), IDS, IDS[:3], scales="one"), qk[IDS][:, IDS[:3]], 1e-12)


def test_skip_trigrams_are_the_largest_entries_of_both_tables(x64):
    for variant, layer in (("llama", 1), ("gpt2", -1)):
        m = model(variant, dtype="float64")
        found = skip_trigrams(m, (layer, 2), IDS, 6, distance=3)
        every = np.arange(31)
        for top, table in [
            (found.destinations, np.asarray(qk_table(m, (layer, 2), every, IDS, distance=3)).T),
            (found.outputs, np.asarray(ov_table(m, (layer, 2), IDS))),
        ]:
            np.testing.assert_array_equal(top.tokens, np.argsort(-table)[:, :6])
            close(top.values, -np.sort(-table)[:, :6], 1e-12)
        np.testing.assert_array_equal(found.source, IDS)


def test_no_table_of_all_pairs_exists():
    m = model("llama", vocab_size=997, d_model=8, n_heads=1, n_kv_heads=1, n_layers=1)
    sizes = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.extend(v.aval.size for v in eqn.outvars)
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(lambda m: skip_trigrams(m, (0, 0), [3, 4], 5))(m).jaxpr)
    walk(jax.make_jaxpr(lambda m: top_bigrams(m, [3, 4], 5))(m).jaxpr)
    assert max(sizes) <= 997 * 8


def test_traced_heads_jit_dtypes_and_compilations():
    m = model("mixed")
    plain = ov_table(m, (2, 3), IDS)
    close(jax.jit(lambda m, i, h: ov_table(m, (i, h), IDS))(m, -1, 3), plain, 1e-5)
    q = qk_table(m, (2, 3), IDS, 7, distance=2)
    assert q.shape == (5, 1)
    close(jax.jit(lambda i: qk_table(m, (i, 3), IDS, 7, distance=2))(2), q, 1e-5)
    skip_trigrams(m, (0, 1), IDS, 4)
    with compilations() as names:
        ov_table(m, (1, 0), IDS[::-1])
        qk_table(m, (0, 5), IDS, 9, distance=4)
        skip_trigrams(m, (2, 0), IDS[::-1], 4, distance=2)
    assert names == []
    half = model("llama", dtype="bfloat16")
    for found in (bigram_logits(half, IDS), ov_table(half, (0, 0), IDS),
                  qk_table(half, (0, 0), IDS, IDS), top_bigrams(half, IDS, 3).values):  # fmt: skip
        assert found.dtype == jnp.float32 and np.isfinite(found).all()
    assert bigram_logits(m, 5).shape == (1, 31)


def test_bad_input():
    m, gpt2 = model("llama"), model("gpt2")
    for broken, error, message in [
        (lambda: bigram_logits(m, 31), ValueError, r"`tokens` must be in \[0, 31\), got \[31\]"),
        (lambda: bigram_logits(m, [[1]]), ValueError, r"`tokens` must be an int or `\[N\]`"),
        (lambda: bigram_logits(m, 3, positions=0), ValueError,
         "`positions` must be None without learned ones, got positions for a model with pos"),
        (lambda: bigram_logits(gpt2, IDS, positions=[1, 2]), ValueError,
         r"`positions` must be an int or ints of shape \(5,\), got"),
        (lambda: ov_table(gpt2, (0, 0), 3, positions=40), IndexError,
         r"`positions` must be in \[0, 40\), got \[40\]"),
        (lambda: ov_table(m, (3, 0), 3), IndexError, r"`head\[0\]` must be in \[-3, 3\), got 3"),
        (lambda: ov_table(m, (0, 6), 3), IndexError, r"`head\[1\]` must be in \[-6, 6\), got 6"),
        (lambda: ov_table(m, (0, 0), 3, scales="all"), ValueError, "`scales` must be one of"),
        (lambda: qk_table(m, (0, 0), 3, 31), ValueError, r"`sources` must be in \[0, 31\)"),
        (lambda: qk_table(m, (0, 0), 3, 3, distance=-1), ValueError, "`distance` must be at least"),
        (lambda: qk_table(model("shared_norm"), (0, 0), 3, 3), ValueError,
         "`model` must be one whose scores are bilinear in the embeddings, got one with qk_norm"),
        (lambda: skip_trigrams(model("post"), (0, 0), 3), ValueError, "bilinear"),
        (lambda: skip_trigrams(m, (0, 0), 3, 32), ValueError, r"`k` must be an int in \[1, 31\]"),
        (lambda: top_bigrams(m, 3, 0), ValueError, r"`k` must be an int in \[1, 31\], got 0"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            broken()
