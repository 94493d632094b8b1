"""Compile time of the forward and of the gradients at every site, at 4 and at 48 layers.

python benchmarks/compile_time.py [--json FILE]     (aim: a ratio of 1.5)
"""

import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from report import report

from arrakis_jax import Transformer, config_for, residual_gradients

PROGRAMS = {
    "forward": lambda m, t: m(t),
    "gradients at every site": lambda m, t: residual_gradients(m, t, 3, against=4),
}
REPEATS = 5


def seconds(program, n_layers: int) -> float:
    config = config_for("gpt2", n_layer=n_layers, n_embd=64, n_head=4, vocab_size=1000)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    times = []
    for _ in range(REPEATS):
        jax.clear_caches()
        began = time.perf_counter()
        jax.jit(program).lower(model, tokens).compile()
        times.append(time.perf_counter() - began)
    return min(times)


def main(json_file: Annotated[Path | None, typer.Option("--json")] = None) -> None:
    rows = []
    for name, program in PROGRAMS.items():
        short, long = seconds(program, 4), seconds(program, 48)
        rows.append(
            {"program": name, "4 layers, s": short, "48 layers, s": long, "ratio": long / short}
        )
    report("compile time", rows, json_file)


if __name__ == "__main__":
    typer.run(main)
