"""A 6.7B-parameter Llama in bfloat16 on a CPU: random init, and the three tools on 1 x 50 tokens.

python benchmarks/large_model.py [--layers 32] [--json FILE]

Times include compilation. The bounds, at 32 layers: 180 s for the initialisation, and 20 GiB for
the peak of the whole process (VmHWM of /proc/self/status, so Linux only).
"""

import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from flax import nnx
from report import report

from arrakis_jax import ResidualTools, Transformer, config_for, run

INIT_SECONDS, PEAK_GIB = 180, 20


def peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def main(layers: int = 32, json_file: Annotated[Path | None, typer.Option("--json")] = None):
    config = config_for("llama", dtype="bfloat16", num_hidden_layers=layers)
    rows = []

    def timed(step: str, function):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        seconds = time.perf_counter() - start
        rows.append({"step": step, "seconds": seconds, "peak so far, GiB": peak_gib()})
        return result

    model = timed("initialisation", lambda: Transformer(config, rngs=nnx.Rngs(0)))
    n = sum(leaf.size for leaf in jax.tree.leaves(model))
    tools = ResidualTools(model)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, 50))
    out = timed("run", lambda: run(model, tokens))
    timed("residual_decomposition", lambda: tools.residual_decomposition(out, layers // 2))
    timed("residual_movement", lambda: tools.residual_movement(tokens, 0, -1))
    timed("feature_attribution", lambda: tools.feature_attribution(tokens, 3))
    timed("feature_attribution again", lambda: tools.feature_attribution(tokens, 4))
    report(f"a Llama of {n / 1e9:.2f}B parameters in bfloat16", rows, json_file)
    if layers == 32 and (rows[0]["seconds"] > INIT_SECONDS or peak_gib() > PEAK_GIB):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
