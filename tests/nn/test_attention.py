"""Attention: rotary positions, their scaling, and grouped keys and values, in plain numpy."""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import Logit, RopeScaling, Transformer, patch_sweep, residual_gradients, run
from arrakis_jax.nn import rotary
from arrakis_jax.nn.context import slopes
from arrakis_jax.nn.rotary import rotate
from arrakis_jax.stream.padding import Padding
from tests.models import LLAMA3, close, config, model


def frequencies(cfg, longest=0):
    return np.asarray(rotary.frequencies(cfg.rope_theta, cfg.rope_scaling, cfg.d_rotary, longest))


def rotation(cfg, positions):
    longest = positions.max() + 1
    return rotary.rotation(cfg, cfg.rope_theta, cfg.rope_scaling, positions, longest)


def rotated(x, position, cfg):
    """Rotates pairs (i, i + K/2) as complex numbers."""
    half = cfg.d_head // 2
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies(cfg))
    return np.concatenate([turned.real, turned.imag])


@pytest.mark.parametrize("variant", ["llama", "llama3"])
def test_scores_depend_on_the_distance_only(variant, x64):
    """The bilinear identity: (R_t q) . (R_s k) = q . (R_{s-t} k)."""
    cfg = config(variant, dtype="float64", d_head=8)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 8))
    positions = np.array([0, 1, 2, 7, 30])
    cos, sin = rotation(cfg, jnp.asarray(positions)[None])
    q_all, k_all = (
        np.asarray(rotate(jnp.tile(jnp.asarray(x), (1, 5, 1, 1)), cos, sin))[0, :, 0]
        for x in (q, k)
    )
    for i, t in enumerate(positions):
        np.testing.assert_allclose(q_all[i], rotated(q, t, cfg), atol=1e-13)
        for j, s in enumerate(positions):
            np.testing.assert_allclose(q_all[i] @ k_all[j], q @ rotated(k, s - t, cfg), atol=1e-12)


def test_interleaved_pairs_are_the_same_up_to_a_permutation(x64):
    cfg = config(dtype="float64", d_head=8)
    x = np.random.default_rng(0).normal(size=8)
    cos, sin = rotation(cfg, jnp.array([[5]]))
    halves = np.asarray(rotate(jnp.asarray(x)[None, None, None], cos, sin))[0, 0, 0]
    angle = 5 * frequencies(cfg)
    interleaved = x[[0, 4, 1, 5, 2, 6, 3, 7]]
    again = rotate(jnp.asarray(interleaved)[None, None, None], cos, sin, interleaved=True)
    np.testing.assert_array_equal(np.asarray(again)[0, 0, 0, ::2], halves[:4])
    np.testing.assert_array_equal(np.asarray(again)[0, 0, 0, 1::2], halves[4:])
    pairs = (interleaved[::2] + 1j * interleaved[1::2]) * np.exp(1j * angle)
    np.testing.assert_allclose(halves[:4], pairs.real, atol=1e-13)
    np.testing.assert_allclose(halves[4:], pairs.imag, atol=1e-13)


def test_llama3_scaling_written_out():
    """Long waves are slowed by the factor, short ones kept, those between interpolated."""
    cfg = config("llama3", d_head=64)
    plain = 100.0 ** (-np.arange(0, 64, 2) / 64)
    want = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < 16 / 4.0:
            want.append(frequency)
        elif wavelength > 16 / 1.0:
            want.append(frequency / 4.0)
        else:
            smooth = (16 / wavelength - 1.0) / (4.0 - 1.0)
            want.append((1 - smooth) * frequency / 4.0 + smooth * frequency)
    np.testing.assert_allclose(frequencies(cfg), want, rtol=1e-12)
    assert isinstance(LLAMA3, RopeScaling) and len({*np.round(want / plain, 6)}) > 3


@pytest.mark.parametrize("variant", ["llama3", "gpt2"])
def test_grouped_queries_equal_the_expanded_twin(variant, x64):
    """Query head h reads key/value head h // (H / G): every key/value head written out R times."""
    m = model(variant, dtype="float64", n_heads=6, n_kv_heads=2)
    twin = Transformer(config(variant, dtype="float64", n_heads=6, n_kv_heads=6), rngs=nnx.Rngs(0))
    paths, structure = jax.tree_util.tree_flatten_with_path(m)

    def expand(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        axis = {"w_k": 2, "w_v": 2, "b_k": 1, "b_v": 1}.get(name.split(".")[-1])
        return leaf if axis is None else jnp.repeat(leaf, 3, axis)

    twin = jax.tree.unflatten(jax.tree.structure(twin), [expand(*item) for item in paths])
    tokens = np.random.default_rng(0).integers(31, size=(2, 9))
    a, b = run(m, tokens, capture="all"), run(twin, tokens, capture="all")
    close(a.logits, b.logits, 1e-13)
    for name in ("pattern", "z", "q", "attn_out", "resid_mid"):
        close(getattr(a.residuals, name), getattr(b.residuals, name), 1e-13, name)
    close(jnp.repeat(a.residuals.v, 3, 3), b.residuals.v, 1e-13)


def test_attention_written_out(x64):
    """One head at a time, in numpy, with no einsum in common."""
    m = model("llama", dtype="float64")
    cfg, attn = m.config, m.blocks.attn
    tokens = np.random.default_rng(0).integers(31, size=(1, 7))
    r = run(m, tokens, capture="all").residuals
    for layer in range(cfg.n_layers):
        x = np.asarray(r.resid_pre[layer, 0])
        scale = np.sqrt((x**2).mean(-1) + cfg.norm_eps)
        x = x / scale[:, None] * np.asarray(m.blocks.norm_attn.w[layer])
        total = np.zeros_like(x)
        for h in range(cfg.n_heads):
            g = h // (cfg.n_heads // cfg.n_kv_heads)
            q, k, v = (x @ np.asarray(w[layer][:, i]) for w, i in
                       ((attn.w_q, h), (attn.w_k, g), (attn.w_v, g)))  # fmt: skip
            q, k = (np.stack([rotated(y[t], t, cfg) for t in range(7)]) for y in (q, k))
            score = np.where(np.tri(7, dtype=bool), q @ k.T / np.sqrt(cfg.d_head), -np.inf)
            pattern = np.exp(score - score.max(-1, keepdims=True))
            pattern /= pattern.sum(-1, keepdims=True)
            close(r.pattern[layer, 0, h], pattern, 1e-12)
            total += pattern @ v @ np.asarray(attn.w_o[layer, h])
        close(r.attn_out[layer, 0], total, 1e-12)


def test_a_part_of_a_head_is_rotated(x64):
    cfg = config(dtype="float64", d_head=10, rotary_dim=6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 1, 10)))
    turned = rotate(x, *rotation(cfg, jnp.array([[5]])))
    whole = rotate(x[..., :6], *rotation(config(dtype="float64", d_head=6), jnp.array([[5]])))
    np.testing.assert_array_equal(turned[..., :6], whole)
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])


@pytest.mark.parametrize("n_heads", [1, 6, 8, 12])
def test_slopes_written_out(n_heads):
    """Those of the largest power of two below, then every other one of twice that many."""
    power = {1: 1, 6: 4, 8: 8, 12: 8}[n_heads]
    want = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    twice = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)]
    want += twice[::2][: n_heads - power]
    np.testing.assert_allclose(slopes(n_heads), want, rtol=1e-12)


def test_windows_count_real_tokens():
    """A query reads itself and the two real tokens before it, whatever padding is between."""
    mask = np.array([[1, 0, 1, 1, 0, 1, 1]], bool)
    allowed = np.asarray(Padding.of((1, 7), mask).allowed(3))[0]
    assert [np.flatnonzero(row).tolist() for row in allowed[mask[0]]] == [
        [0], [0, 2], [0, 2, 3], [2, 3, 5], [3, 5, 6],
    ]  # fmt: skip
    plain = np.asarray(Padding.of((1, 5), None).allowed(2))[0]
    assert (plain == np.tri(5, dtype=bool) & ~np.tri(5, k=-2, dtype=bool)).all()


def test_gradients_copy_no_weight_and_few_scores():
    """On a CPU XLA copies operands whose axes are not as its products want them."""
    m, tokens = model("llama"), np.arange(14).reshape(2, 7)
    gradient = jax.jit(lambda m: residual_gradients(m, tokens, 3).resid_pre)
    program = gradient.lower(m).compile().as_text()
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* (?:copy|transpose)\(", program)
    copied = Counter(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert copied  # queries', keys' and values', whose heads stand behind the positions
    d, h, g, k = 20, 6, 3, 4
    assert not copied[d * h * k] and not copied[d * g * k]
    assert copied[2 * h * 7 * 7] <= 2


SCALED_BY_LENGTH = {
    "dynamic": RopeScaling(kind="dynamic", factor=3.0, original_max_positions=4),
    "longrope": RopeScaling(
        kind="longrope", short_factor=(1.0, 1.5), long_factor=(2.0, 5.0), original_max_positions=4
    ),
}


@pytest.mark.parametrize("kind", SCALED_BY_LENGTH)
def test_a_short_prompt_beside_a_long_one_has_its_own_scaling(kind, x64):
    """The frequencies of a prompt depend on its length alone, wherever its padding is."""
    m = model("llama", dtype="float64", rope_scaling=SCALED_BY_LENGTH[kind], d_head=4)
    tokens = np.random.default_rng(0).integers(31, size=(2, 9))
    for columns in (slice(6, 9), slice(0, 3), slice(2, 5)):
        mask = np.ones((2, 9), bool)
        mask[1] = False
        mask[1, columns] = True
        both = run(m, tokens, mask=mask).logits
        close(both[1, columns], run(m, tokens[1:, columns]).logits[0], 1e-12)
        close(both[0], run(m, tokens[:1]).logits[0], 1e-12)
    # Also where keys and values of earlier columns are reused.
    source = np.roll(tokens, 1, 0)
    sweep = patch_sweep(m, tokens, source, Logit(3), mask=mask, sites="resid_pre")
    alone = patch_sweep(m, tokens[1:, 2:5], source[1:, 2:5], Logit(3), sites="resid_pre")
    close(sweep.effects[:, 2:5, 1], alone.effects[..., 0], 1e-11)
