"""OV and QK matrices: algebra of the factors, and the forward's own scores and writes from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from arrakis_jax import RopeScaling, run
from arrakis_jax.circuits.matrices import ov_matrices, qk_matrices
from tests.models import KINDS, VARIANTS, chosen, close, compilations, model

YARN = RopeScaling(
    kind="yarn", factor=4.0, beta_fast=2.0, beta_slow=0.5, original_max_positions=8,
    attention_factor=1.3,
)  # fmt: skip
LONGROPE = RopeScaling(
    kind="longrope", short_factor=(1.0, 1.5), long_factor=(2.0, 5.0), original_max_positions=4,
    attention_factor=1.2,
)  # fmt: skip
# Attention of every kind that is linear in the stream: not with clip_qkv.
SCORED = {
    **{name: {} for name in VARIANTS if name != "scaled"},
    "yarn": dict(rope_scaling=YARN, rotary_dim=2),
    "layernorm_all_heads": dict(norm="layernorm", qk_norm="all_heads"),
    "mqa": dict(n_kv_heads=1),
}
T = 9


def built(name, **changes):
    changes = {"dtype": "float64", **SCORED.get(name, {}), **changes}
    return model(name if name in VARIANTS else "llama", **changes)


def captured(m, t=T):
    tokens = np.random.default_rng(1).integers(m.config.vocab_size, size=(2, t))
    return run(m, tokens, capture="all").residuals


def reads(m, stream):
    """What attention's weights read, over the scale of the norm before it, and a one."""
    x = np.asarray(stream.resid_pre)
    if m.config.norm and m.config.norm_placement not in ("post", "stream_after"):
        x = x / np.asarray(stream.norm_attn_scale)[..., None]
    return np.concatenate([x, np.ones_like(x[..., :1])], -1)


def per_head(scale, n_heads):
    """A scale of queries or keys as `[L,B,H,T]`."""
    scale = np.asarray(scale)
    scale = scale[..., None] if scale.ndim == 3 else scale
    return np.moveaxis(np.repeat(scale, n_heads // scale.shape[-1], -1), -1, 2)


def own_scores(m, stream):
    """The forward's products of queries and keys, `[L,B,H,T,S]`."""
    k = np.repeat(np.asarray(stream.k), m.config.n_heads // m.config.n_kv_heads, -2)
    return np.einsum("lbihk,lbjhk->lbhij", np.asarray(stream.q), k)


@pytest.mark.parametrize(
    "name", chosen(SCORED, [*KINDS, "stream_before", "yarn", "layernorm_all_heads", "mqa"])
)
def test_scores_of_the_forward(name, x64):
    m = built(name)
    stream = captured(m)
    x, scores = reads(m, stream), own_scores(m, stream)
    seen = np.zeros(scores.shape[-2:], bool)
    for distance in range(T):
        f = qk_matrices(m, distance=distance, biases=True)
        assert f.left.shape == (m.config.n_layers, 6, 21, 4)
        found = np.einsum("lbid,lhdk,lhke,lbje->lbhij", x, f.left, f.right, x, optimize=True)
        if m.config.qk_norm:
            found = found / per_head(stream.norm_q_scale, 6)[..., :, None]
            found = found / per_head(stream.norm_k_scale, 6)[..., None, :]
        i = np.arange(distance, T)
        close(found[..., i, i - distance], scores[..., i, i - distance], 1e-12)
        seen[i, i - distance] = True
    assert (seen == np.tril(seen | True)).all()


@pytest.mark.parametrize("name", [n for n in VARIANTS if n != "scaled"])
def test_writes_of_the_forward(name, x64):
    """Every head's write from every source, up to the frozen scales of norms after it."""
    m = built(name)
    c, stream = m.config, captured(m)
    ov = ov_matrices(m, biases=True)
    moved = np.einsum("lbjd,lhdk,lhke->lbhje", reads(m, stream), ov.left, ov.right, optimize=True)
    found = np.einsum("lbhij,lbhje->lbie", stream.pattern, moved, optimize=True)

    def after(norm, value, scale):
        """A norm over its scale, and its bias, in numpy."""
        if c.norm == "layernorm":
            value = value - value.mean(-1, keepdims=True)
        gain = 1 if norm.w is None else np.asarray(norm.w[...])[:, None, None] + c.norm_offset
        bias = 0 if norm.b is None else np.asarray(norm.b[...])[:, None, None]
        scale = np.asarray(scale)[..., None]
        return value * gain / scale, bias, scale

    attn = [block.attn for block, _ in m.stacks()]
    b_o = 0
    if c.out_bias:
        b_o = np.concatenate([np.asarray(a.b_o[...]) for a in attn])[:, None, None]
    if c.norm_placement in ("post", "both"):
        norm = jax.tree.map(
            lambda *x: jnp.concatenate(x), *[b.norm_attn_out for b, _ in m.stacks()]
        )
        constant, bias, scale = after(norm, b_o + 0 * found, stream.norm_attn_out_scale)
        close(found / scale + constant + bias, stream.attn_out, 1e-12)
    elif c.norm_placement == "stream_after":
        norm = m.blocks.norm_attn
        own, bias, scale = after(norm, stream.resid_pre + b_o, stream.norm_attn_scale)
        close(found / scale + own + bias, stream.resid_mid, 1e-12)
    else:
        close(found + b_o, stream.attn_out, 1e-12)


def test_multipliers_and_unfolded_weights(x64):
    m = built("scaled")
    plain = ov_matrices(m, fold=False)
    attn = m.blocks.attn
    close(plain.right, attn.w_o[...], 0)
    close(plain.left, np.repeat(np.moveaxis(np.asarray(attn.w_v[...]), 2, 1), 2, 1), 0)
    close(ov_matrices(m).right, 0.4 * np.asarray(attn.w_o[...]), 1e-15)
    gain = np.asarray(m.blocks.norm_attn.w[...])[:, None, :, None]
    close(ov_matrices(m).left, gain * np.asarray(plain.left), 1e-15)
    m = built("llama3")
    biased = qk_matrices(m, fold=False, biases=True)
    close(biased.left[..., :-1, :], np.moveaxis(np.asarray(m.blocks.attn.w_q[...]), 2, 1), 0)
    close(biased.left[..., -1, :], m.blocks.attn.b_q[...], 0)


@pytest.mark.parametrize("name", ["gpt2", "post", "shared_norm", "gpt_oss"])
def test_biases_only_add_a_row(name, x64):
    m = built(name)
    for tool in (ov_matrices, qk_matrices):
        plain, biased = tool(m), tool(m, biases=True)
        close(biased.left[..., :-1, :], plain.left, 1e-15)
        close(biased.right[..., : plain.shape[-1]], plain.right, 1e-15)


def test_half_and_interleaved_rope_are_one_permutation(x64):
    """The same weights with the pairs (i, i + n) moved to (2i, 2i + 1)."""
    half = built("llama")
    woven = built("llama", rope_interleaved=True)
    for name in ("w_q", "w_k"):
        w = getattr(half.blocks.attn, name)[...]
        getattr(woven.blocks.attn, name)[...] = w[..., np.array([0, 2, 1, 3])]
    for distance in (0, 1, 5):
        a, b = (qk_matrices(m, distance=distance).expand() for m in (half, woven))
        close(a, b, 1e-14)
    woven.blocks.attn.w_q[...] = half.blocks.attn.w_q[...]
    assert np.abs(qk_matrices(woven, distance=5).expand() - a).max() > 0.1


def test_grouped_heads_equal_their_expanded_twin(x64):
    gqa, mha = built("llama"), built("llama", n_kv_heads=6)
    for name in ("w_q", "w_k", "w_v", "w_o"):
        w = getattr(gqa.blocks.attn, name)[...]
        w = jnp.repeat(w, 2, 2) if name in ("w_k", "w_v") else w
        getattr(mha.blocks.attn, name)[...] = w
    mha.blocks.norm_attn.w[...] = gqa.blocks.norm_attn.w[...]
    for tool in (ov_matrices, lambda m: qk_matrices(m, distance=2)):
        close(tool(gqa).expand(), tool(mha).expand(), 1e-15)


def test_rope_turns_by_the_distance_and_several_are_averaged(x64):
    m = built("llama")
    each = [np.asarray(qk_matrices(m, distance=d).expand()) for d in range(4)]
    assert np.abs(each[1] - each[0]).max() > 0.1
    mean = qk_matrices(m, distance=np.arange(4))
    assert mean.left.shape == (3, 6, 20, 4)
    close(mean.expand(), np.mean(each, 0), 1e-13)
    m = built("gpt2")
    close(qk_matrices(m, distance=7).expand(), qk_matrices(m).expand(), 0)
    m = built("nope")
    near, far = (np.asarray(qk_matrices(m, distance=d).expand()) for d in (0, 3))
    same = [np.array_equal(a, b) for a, b in zip(near, far, strict=True)]
    assert same == [False, True, False]


def test_longrope_is_that_of_the_distance(x64):
    """A text of distance + 1 tokens decides between the short and the long frequencies."""
    m = built("llama", rope_scaling=LONGROPE)
    for t in (3, 7):
        stream = captured(m, t)
        f = qk_matrices(m, distance=t - 1)
        x = reads(m, stream)[..., :-1]
        found = np.einsum("lbd,lhdk,lhke,lbe->lbh", x[:, :, -1], f.left, f.right, x[:, :, 0])
        close(found, own_scores(m, stream)[..., -1, 0], 1e-12)


def test_repr_and_dtypes():
    m = model("gpt2", dtype="bfloat16")
    f = qk_matrices(m, biases=True)
    assert repr(f) == "Factored(left=float32[3, 6, 21, 4], right=float32[3, 6, 4, 21])"
    assert f.frobenius().dtype == jnp.float32
    wide = model("gpt2")
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(m)]
    wide = jax.tree.unflatten(jax.tree.structure(wide), leaves)
    close(f.left, qk_matrices(wide, biases=True).left, 1e-6)


@pytest.mark.parametrize("name", ["llama", "mixed", "both"])
def test_jit_equals_no_jit_and_compiles_once(name, x64):
    m = built(name)
    f = qk_matrices(m, distance=3)
    inside = jax.jit(lambda m, d: qk_matrices(m, distance=d))(m, 3)
    close(inside.left, f.left, 1e-14)
    close(jax.jit(ov_matrices)(m).left, ov_matrices(m).left, 1e-14)
    with compilations() as names:
        qk_matrices(m, distance=5)
        ov_matrices(m)
    assert names == []


def test_few_layers():
    for n in (0, 1):
        m = model(n_layers=n)
        assert ov_matrices(m).shape == qk_matrices(m, distance=2).shape == (n, 6, 20, 20)


def test_exports_for_accelerators():
    m = model("both")
    leaves, structure = jax.tree.flatten(m)

    def flat(leaves, distance):
        m = jax.tree.unflatten(structure, leaves)
        qk, ov = qk_matrices(m, distance=distance), ov_matrices(m)
        return [*qk.svd(), ov.frobenius(), (qk @ ov).trace(), ov.core]

    exported = export.export(jax.jit(flat), platforms=("cpu", "cuda", "tpu"))(leaves, 2)
    again = export.deserialize(bytearray(exported.serialize())).call(leaves, 2)
    for a, b in zip(again, flat(leaves, 2), strict=True):
        close(a, b, 1e-4)


def test_bad_input():
    m = model()
    with pytest.raises(ValueError, match="`distance` must be at least 0, got -1; attention is"):
        qk_matrices(m, distance=-1)
    for wrong in (1.0, "1", True, [[1], [2, 3]]):
        with pytest.raises(TypeError, match="`distance` must be an int, or ints `.N.`, got"):
            qk_matrices(m, distance=wrong)
    for wrong in ([], [[1]]):
        with pytest.raises(ValueError, match="`distance` must be an int, or ints .*got shape"):
            qk_matrices(m, distance=np.array(wrong, int))
    m = model("gpt2", qk_norm="head", qk_norm_bias=True)
    with pytest.raises(ValueError, match="`biases` must be False for this model, got True, and"):
        qk_matrices(m, biases=True)
    qk_matrices(m)
    qk_matrices(m, fold=False, biases=True)
