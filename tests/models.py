"""Small models for tests: every parameter random, sizes unequal, in every supported shape."""

import functools
import logging
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import ModelConfig, RopeScaling, Transformer, config_for

BASE = dict(
    n_layers=3, d_model=20, n_heads=6, n_kv_heads=3, d_head=4, d_mlp=28, vocab_size=31,
    norm="rmsnorm", norm_eps=1e-5, positions="rope", max_positions=40, rope_theta=100.0,
    activation="silu", gated=True,
)  # fmt: skip

# The demo's sentence.
SENTENCE = "When Mary and John went to the store, John gave a drink to"

LLAMA3 = RopeScaling(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=16
)
NO_ROPE = dict(positions="learned", rope_theta=None)
BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True)
GPT2 = dict(
    norm="layernorm", gated=False, activation="gelu_tanh", n_kv_heads=6, **NO_ROPE, **BIASES
)

ROPE = dict(positions="rope", rope_theta=100.0)
MOE = dict(n_experts=5, experts_per_token=2, d_expert=11)
WINDOWS = dict(window=4, window_layers=(True, False, True), window_rope_theta=10.0)

VARIANTS = {
    "llama": {},
    "llama3": dict(rope_scaling=LLAMA3, **BIASES),
    "tied": dict(tied=True, activation="gelu"),
    "gpt2": dict(tied=True, scale_by_inverse_layer=True, **GPT2),
    "unembed_bias": dict(unembed_bias=True, attention_scale=0.3, **GPT2),
    "no_norm": dict(norm=None, norm_eps=None),
    "attention_only": dict(d_mlp=0, gated=False, activation="identity", out_bias=True),
    "bilinear": dict(activation="identity"),
    "relu": dict(activation="relu", gated=False, positions=None, rope_theta=None),
    "one_layer": dict(n_layers=1),
    "post": dict(norm_placement="post", qk_norm="all_heads"),
    "both": dict(
        norm_placement="both",
        norm_offset=1.0,
        qk_norm="head",
        embed_scale=20**0.5,
        attention_softcap=2.0,
        logit_softcap=3.0,
        **WINDOWS,
    ),
    "post_layernorm": dict(norm_placement="both", **GPT2),
    "parallel": dict(parallel=True, rotary_dim=2, **GPT2 | ROPE),
    "shared_norm": dict(
        parallel=True,
        shared_norm=True,
        rope_interleaved=True,
        norm="layernorm",
        norm_bias=False,
        qk_norm="each_head",
        logit_scale=0.3,
        tied=True,
    ),
    "stream_after": dict(
        norm_placement="stream_after", final_norm=False, d_embed=12, position_offset=2, **GPT2
    ),
    "stream_before": dict(
        norm_placement="stream_before", embed_norm=True, **GPT2 | dict(positions="alibi")
    ),
    "stream_mixed": dict(moe_layers=(True, False, True), norm_placement="stream_before", **MOE),
    "stream_rms": dict(norm_placement="stream_after"),
    "scaled": dict(residual_scale=0.4, embed_scale=3.0, logit_scale=0.2, clip_qkv=0.8),
    "bare_norm": dict(norm="layernorm", norm_gain=False, norm_bias=False),
    "moe": dict(d_mlp=0, **MOE),
    "mixed": dict(d_shared_expert=10, moe_layers=(False, True, True), **MOE),
    "mixed_more": dict(moe_layers=(True, False, True), norm_placement="both", **MOE),
    "gpt_oss": dict(
        d_mlp=0,
        sinks=True,
        mlp_limit=0.9,
        up_offset=1.0,
        renormalise=True,
        router_bias=True,
        **BIASES,
        **WINDOWS,
        **MOE | dict(activation="quick_gelu"),
    ),
    "nope": dict(rope_layers=(True, False, True)),
}


# One variant of each kind of block; the others add options to these.
KINDS = ("llama", "gpt2", "post", "both", "parallel", "stream_after", "mixed", "gpt_oss")


# Each way of splitting a sum into terms once, in a kind of block where it does most.
WAYS = (
    ("llama", "component"), ("gpt2", "head"), ("post", "source"), ("both", "neuron"),
    ("parallel", "head"), ("stream_after", "source"), ("mixed", "expert"), ("mixed", "neuron"),
    ("gpt_oss", "source"),
)  # fmt: skip


def chosen(parameters, default=KINDS):
    """All parameters of a test; those outside `default` run only with `-m exhaustive`."""
    return [
        each
        if each in default
        else pytest.param(
            *(each if isinstance(each, tuple) else (each,)), marks=pytest.mark.exhaustive
        )
        for each in parameters
    ]


def config(variant: str = "llama", **changes) -> ModelConfig:
    return ModelConfig(**BASE | VARIANTS[variant] | changes)


def randomised(model: Transformer, seed: int = 0) -> Transformer:
    """Matrices of std 1.7 / sqrt(D), gains 1 +- 0.3, biases 0.3: no default hides a bug."""
    rng = np.random.default_rng(seed)
    paths, structure = jax.tree_util.tree_flatten_with_path(model)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        value = rng.normal(size=leaf.shape)
        if "norm" in name and ".w." in name:
            value = 1 + 0.3 * value
        elif ".b_" in name or ".b." in name or name.startswith("b_") or "sinks" in name:
            value = 0.3 * value
        else:
            value = 1.7 / np.sqrt(model.config.d_model) * value
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.unflatten(structure, [draw(*item) for item in paths])


def model(variant: str = "llama", *, seed: int = 0, **changes) -> Transformer:
    return built(config(variant, **changes), seed)


def built(described: ModelConfig, seed: int = 0) -> Transformer:
    return randomised(nnx.eval_shape(lambda: Transformer(described, rngs=nnx.Rngs(0))), seed)


@functools.cache
def gpt2_small():
    return nnx.eval_shape(lambda: Transformer(config_for("gpt2"), rngs=nnx.Rngs(0)))


def batch(seed: int = 0, vocab: int = 31, lengths=(7, 9, 4, 1, 6), side: str = "left"):
    """Prompts of unequal length in one batch, with garbage at padding: tokens, mask, prompts."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(vocab, size=n) for n in lengths]
    width = max(lengths) + 2
    tokens = rng.integers(-5, 10 * vocab, size=(len(lengths), width))
    mask = np.zeros(tokens.shape, bool)
    for b, prompt in enumerate(prompts):
        free = width - len(prompt)
        if side == "left":
            where = np.arange(free, width)
        elif side == "right":
            where = np.arange(len(prompt))
        elif side == "both":
            where = np.arange(free // 2, free // 2 + len(prompt))
        else:
            where = np.sort(rng.choice(width, len(prompt), replace=False))
        tokens[b, where] = prompt
        mask[b, where] = True
    return tokens, mask, prompts


def close(a, b, tolerance: float, message: str = "") -> None:
    """Asserts max|a - b| <= tolerance * max|b|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    error, scale = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
    assert error <= tolerance * scale, f"{message} {error:.3g} > {tolerance} * {scale:.3g}"


@contextmanager
def compilations():
    """A list that receives the name of every program compiled inside."""
    names: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            if message.startswith("Compiling"):
                names.append(message.split()[1])

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield names
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
