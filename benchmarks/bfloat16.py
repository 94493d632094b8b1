"""What does rounding operands to bfloat16 save and cost: matmul_precision "default"?

Speed: the forward of two layers of the 6.7B shape of Llama on 1 x 50 and 1 x 512 tokens, over
"highest". Error: of the logits of random models of many shapes, against "highest", relative to the
largest logit; matrices have a std of 1.7 / sqrt(D), so that attention is not flat.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arrakis_jax import Transformer, config_for, run
from benchmarks.cost import clocked, medians
from benchmarks.options import Options

SIZES = dict(vocab_size=501, hidden_size=96, num_hidden_layers=4, num_attention_heads=6)
SHAPES = {
    "gpt_neox": dict(SIZES, intermediate_size=384),
    "llama": dict(SIZES, num_key_value_heads=2, intermediate_size=256),
    "gemma2": dict(SIZES, num_key_value_heads=2, intermediate_size=256, head_dim=16),
    "qwen3": dict(SIZES, num_key_value_heads=2, intermediate_size=256, head_dim=16),
    "mixtral": dict(SIZES, num_key_value_heads=2, intermediate_size=256),
}


def figures(options: Options) -> Iterator[dict[str, Any]]:
    shape = SHAPES["llama"] if options.quick else dict(num_hidden_layers=2)
    config = config_for("llama", dtype="bfloat16", **shape)
    large = Transformer(config, rngs=nnx.Rngs(0))
    for length in (8,) if options.quick else (50, 512):
        tokens = jnp.arange(length)[None]
        calls = {
            p: partial(clocked, forward, recast(large, p), tokens) for p in ("highest", "default")
        }
        seconds = medians(options.repeats, calls)
        yield {
            "question": "forward, times as fast",
            "model": f"llama, 1 x {length} tokens",
            "value": seconds["highest"] / seconds["default"],
        }
    tokens = np.random.default_rng(0).integers(501, size=(4, 64))
    for family, shape in SHAPES.items():
        small = spread(Transformer(config_for(family, dtype="bfloat16", **shape), rngs=nnx.Rngs(0)))
        exact, fast = (
            np.asarray(run(recast(small, p), tokens).logits) for p in ("highest", "default")
        )
        error = float(np.abs(fast - exact).max() / np.abs(exact).max())
        yield {"question": "error of the logits", "model": family, "value": error}


def forward(model: Transformer, tokens: jax.Array) -> jax.Array:
    return run(model, tokens, capture=("final",)).residuals.final


def recast(model: Transformer, precision: str) -> Transformer:
    """The same weights, multiplied in this precision."""
    config = replace(model.config, matmul_precision=precision)
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))


def spread(model: Transformer) -> Transformer:
    """Matrices of a trained model's size in place of an initial one's."""
    std = 1.7 / model.config.d_model**0.5
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def draw(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 1 or leaf.shape[:-1] == (model.config.n_layers,):  # gains and biases
            return leaf
        return (std * jax.random.normal(next(keys), leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(draw, model)
