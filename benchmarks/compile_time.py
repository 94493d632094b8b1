"""Compile time of the forward and of the gradients at every site, at 4 and at 48 layers."""

import time

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.table import Table

from arrakis_jax import Transformer, config_for, residual_gradients

PROGRAMS = {
    "forward": lambda m, t: m(t),
    "gradients at every site": lambda m, t: residual_gradients(m, t, 3, against=4),
}


def seconds(program, n_layers: int) -> float:
    config = config_for("gpt2", n_layer=n_layers, n_embd=64, n_head=4, vocab_size=1000)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    times = []
    for _ in range(3):
        jax.clear_caches()
        began = time.perf_counter()
        jax.jit(program).lower(model, tokens).compile()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    table = Table("program", "4 layers", "48 layers", "ratio", title="Compile time (aim: 1.5)")
    for name, program in PROGRAMS.items():
        short, long = seconds(program, 4), seconds(program, 48)
        table.add_row(name, f"{short:.2f} s", f"{long:.2f} s", f"{long / short:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
