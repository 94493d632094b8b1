"""What rounding operands to bfloat16 saves and costs: matmul_precision "default", not "highest".

python benchmarks/bfloat16.py [--json FILE]

Speed: the forward of two layers of the 6.7B shape of Llama on 1 x 50 and 1 x 512 tokens, on the
device that JAX finds. Error: of the logits of random models, of many shapes, against "highest",
relative to the largest logit; matrices have a std of 1.7 / sqrt(D), so that attention is not flat.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import nnx
from report import report

from arrakis_jax import Transformer, config_for, run

SIZES = dict(vocab_size=501, hidden_size=96, num_hidden_layers=4, num_attention_heads=6)
SHAPES = {
    "gpt_neox": dict(SIZES, intermediate_size=384),
    "llama": dict(SIZES, num_key_value_heads=2, intermediate_size=256),
    "gemma2": dict(SIZES, num_key_value_heads=2, intermediate_size=256, head_dim=16),
    "qwen3": dict(SIZES, num_key_value_heads=2, intermediate_size=256, head_dim=16),
    "mixtral": dict(SIZES, num_key_value_heads=2, intermediate_size=256),
}


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


def seconds(model: Transformer, length: int) -> float:
    tokens = jnp.arange(length)[None]
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(run(model, tokens, capture=("final",)))
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first compiles


def main(json_file: Annotated[Path | None, typer.Option("--json")] = None):
    rows = []
    large = Transformer(
        config_for("llama", dtype="bfloat16", num_hidden_layers=2), rngs=nnx.Rngs(0)
    )
    for length in (50, 512):
        highest, default = (seconds(recast(large, p), length) for p in ("highest", "default"))
        rows.append({"what": f"1 x {length} tokens, times as fast", "default": highest / default})
    tokens = np.random.default_rng(0).integers(501, size=(4, 64))
    for family, shape in SHAPES.items():
        config = config_for(family, dtype="bfloat16", **shape)
        small = spread(Transformer(config, rngs=nnx.Rngs(0)))
        exact, fast = (
            np.asarray(run(recast(small, p), tokens).logits) for p in ("highest", "default")
        )
        error = float(np.abs(fast - exact).max() / np.abs(exact).max())
        rows.append({"what": f"{family}, error of the logits", "default": error})
    report("bfloat16 with operands rounded", rows, json_file)


if __name__ == "__main__":
    typer.run(main)
