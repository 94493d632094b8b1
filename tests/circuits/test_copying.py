"""Copying and matching scores against the eigenvalues of the whole V x V matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from arrakis_jax.circuits.copying import (
    copying_ranks,
    copying_scores,
    copying_traces,
    matching_scores,
)
from arrakis_jax.circuits.matrices import ov_matrices, qk_matrices
from tests.induction import induction_model
from tests.models import close, compilations, model

VARIANTS = ["llama", "gpt2", "tied", "post", "both", "shared_norm", "stream_after",
            "stream_before", "bare_norm", "scaled", "mixed", "no_norm"]  # fmt: skip


def gained(norm, x, *, first):
    """Gain and centring of a norm; `first` says whether the gain comes before the centring."""
    gain = 1.0 if norm.w is None else np.asarray(norm.w[...]) + norm.config.norm_offset
    x = x * gain if first else x
    if norm.config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x if first else x * gain


def embedding(m):
    """`[V,D]`, as the stream holds it, over the scale of a norm."""
    e = m.config.embed_scale * np.asarray(m.w_e[...])
    if m.w_project_in is not None:
        e = e @ np.asarray(m.w_project_in[...])
    return e if m.norm_embed is None else gained(m.norm_embed, e, first=False)


def unembedding(m):
    """`[V,D]`, what reads logits from the stream over the scale of the final norm."""
    u = np.asarray(m.w_e[...] if m.w_u is None else m.w_u[...].T) * m.config.logit_scale
    if m.w_project_out is not None:
        u = u @ np.asarray(m.w_project_out[...]).T
    return u if m.norm_final is None else gained(m.norm_final, u, first=True)


def ratio(full):
    values = np.linalg.eigvals(full)
    return values.sum(-1).real / np.abs(values).sum(-1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copying_against_the_full_circuit(variant, x64):
    m = model(variant, dtype="float64")
    full = embedding(m) @ np.asarray(ov_matrices(m).expand()) @ unembedding(m).T
    assert full.shape == (m.config.n_layers, 6, 31, 31)
    close(copying_scores(m), ratio(full), 1e-7)
    close(copying_traces(m), np.trace(full, axis1=-2, axis2=-1) / 31, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_matching_against_the_full_circuit(variant, x64):
    m = model(variant, dtype="float64")
    e = embedding(m)
    for distance in (0, 3, [0, 5]):
        full = e @ np.asarray(qk_matrices(m, distance=distance).expand()) @ e.T
        close(matching_scores(m, distance=distance), ratio(full), 1e-7)


def test_traces_are_what_reading_itself_does_to_a_tokens_logit(x64):
    """In a model without norms: the logits of a stream that one head alone wrote."""
    m = model("no_norm", dtype="float64")
    w_v, w_o = m.blocks.attn.w_v[...][1, :, 2], m.blocks.attn.w_o[...][1, 5]
    written = m.embed_tokens(np.arange(31)) @ w_v @ w_o
    logits = m.readout(written[None]).logits[0]
    close(copying_traces(m)[1, 5], np.mean(np.diag(logits)), 1e-12)


def test_the_hand_built_induction_circuit_copies(x64):
    """G4: its second head copies and seeks another's write; its first does neither to logits."""
    m = induction_model()
    np.testing.assert_allclose(copying_scores(m), [[0], [1]], atol=1e-12)
    np.testing.assert_array_equal(copying_traces(m)[0], 0)
    m.blocks.attn.w_o[...] = -m.blocks.attn.w_o[...]
    np.testing.assert_allclose(copying_scores(m)[1], -1, atol=1e-12)


def test_a_head_that_seeks_its_own_token(x64):
    m = model("no_norm", positions=None, rope_theta=None, n_kv_heads=6, dtype="float64")
    m.blocks.attn.w_k[...] = m.blocks.attn.w_q[...]
    np.testing.assert_allclose(matching_scores(m), 1, atol=1e-9)
    m.blocks.attn.w_k[...] = -m.blocks.attn.w_q[...]
    np.testing.assert_allclose(matching_scores(m), -1, atol=1e-9)


def test_scores_are_bounded_and_zero_without_effect():
    m = model()
    m.blocks.attn.w_o[...] = m.blocks.attn.w_o[...].at[1, 4].set(0)
    scores = np.asarray(copying_scores(m))
    assert scores.shape == (3, 6) and scores.dtype == np.float32
    assert (np.abs(scores) <= 1).all() and scores[1, 4] == 0 and scores.all(-1).sum() == 2
    assert copying_scores(model(n_layers=0)).shape == (0, 6)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "both", "stream_before", "stream_after"])
def test_ranks_against_the_full_circuit(variant, x64):
    m = model(variant, dtype="float64")
    full = embedding(m) @ np.asarray(ov_matrices(m).expand()) @ unembedding(m).T
    own = np.diagonal(full, axis1=-2, axis2=-1)
    larger = (full > own[..., None]).sum(-1)
    for ids in (None, np.array([3, 30, 3])):
        which = np.arange(31) if ids is None else ids
        found = copying_ranks(m, ids)
        close(found.above, larger[..., which].mean(-1) / 30, 1e-12)
        close(found.first, (larger[..., which] == 0).mean(-1), 1e-12)


def test_ranks_of_known_heads(x64):
    """G4: the second head writes the token it reads, but the first token, and the first none."""
    found = copying_ranks(induction_model(), np.arange(1, 9))
    np.testing.assert_array_equal(found.above, [[0.5], [0]])
    np.testing.assert_array_equal(found.first, [[0], [1]])


def test_the_vocabulary_is_summed_in_chunks(x64, monkeypatch):
    tools = copying_traces, matching_scores
    whole = [tool(model("llama", dtype="float64", vocab_size=37)) for tool in tools]
    jax.clear_caches()
    monkeypatch.setattr("arrakis_jax.circuits.copying._CHUNK", 8)
    m = model("llama", dtype="float64", vocab_size=37)
    for tool, expected in zip(tools, whole, strict=True):
        close(tool(m), expected, 1e-10)
    text = str(jax.make_jaxpr(copying_traces)(m))
    assert "8,20" in text and "37,37" not in text and "6,20,20" not in text
    jax.clear_caches()


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_bfloat16_tables_are_read_exactly(variant):
    m = model(variant, dtype="bfloat16")
    wide = model(variant)
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(m)]
    wide = jax.tree.unflatten(jax.tree.structure(wide), leaves)
    close(copying_traces(m), copying_traces(wide), 1e-5)
    close(matching_scores(m), matching_scores(wide), 1e-4)
    assert copying_scores(m).dtype == jnp.float32


def test_jit_compilations_and_export(x64):
    m = model("gpt2", dtype="float64")
    close(jax.jit(copying_traces)(m), copying_traces(m), 1e-13)
    copying_scores(m), matching_scores(m, distance=1), copying_ranks(m, [1, 2])
    with compilations() as names:
        copying_scores(m), copying_traces(m), matching_scores(m, distance=2)
        copying_ranks(m, [4, 3])
    assert names == []
    leaves, structure = jax.tree.flatten(m)
    flat = jax.jit(lambda leaves: copying_traces(jax.tree.unflatten(structure, leaves)))
    exported = export.export(flat, platforms=("cpu", "cuda", "tpu"))(leaves)
    again = export.deserialize(bytearray(exported.serialize())).call(leaves)
    close(again, copying_traces(m), 1e-13)


def test_traces_can_be_differentiated(x64):
    m = model("gpt2", dtype="float64")

    def trace(w_o):
        changed = jax.tree.map(lambda x: x, m)
        changed.blocks.attn.w_o[...] = w_o
        return copying_traces(changed)[1, 2]

    w_o = m.blocks.attn.w_o[...]
    step = 1e-3 * np.random.default_rng(0).normal(size=w_o.shape)
    slope = jax.grad(trace)(w_o)
    close(jnp.sum(slope * step), trace(w_o + step) - trace(w_o), 1e-9)


def test_errors():
    m = model()
    for tool in (copying_scores, matching_scores):
        with pytest.raises(TypeError, match="must be made of numbers, got a traced array"):
            jax.jit(tool)(m)
    with pytest.raises(ValueError, match="`distance` must be at least 0, got -1"):
        matching_scores(m, distance=-1)
    for wrong in (3, [[1]], []):
        with pytest.raises(ValueError, match="`ids` must be token ids `.N.`, got shape"):
            copying_ranks(m, wrong)
    with pytest.raises(ValueError, match=r"`ids` must be in \[0, 31\), got \[31\]"):
        copying_ranks(m, [1, 31])
    with pytest.raises(TypeError, match="`ids` must be integer token ids"):
        copying_ranks(m, [1.0])
