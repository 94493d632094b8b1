"""What does a Llama of 6.7B parameters in bfloat16 take? Random init, and three tools on 50 tokens.

Times include compilation. The aims are 180 s for the initialisation, and 20 GiB for the peak of the
whole process (VmHWM of /proc/self/status, so Linux only).
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.fresh import fresh
from benchmarks.options import Options

QUICK = dict(num_hidden_layers=2, hidden_size=512, intermediate_size=1024, num_attention_heads=8)
SECONDS, GIB = 180, 20


def figures(options: Options) -> Iterator[dict[str, Any]]:
    steps = list(fresh("large_model", json.dumps(options.quick)))
    yield from steps
    if options.quick:
        return
    for step, value, aim in (
        ("initialisation, s", steps[0]["seconds"], SECONDS),
        ("peak, GiB", steps[-1]["peak_gib"], GIB),
    ):
        yield {"step": step, "value": value, "aim": aim, "reached": value <= aim}


def peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    import jax
    import numpy as np
    from flax import nnx

    from arrakis_jax import ResidualTools, Transformer, config_for, run

    def timed(step: str, function: Callable) -> tuple[Any, dict[str, Any]]:
        began = time.perf_counter()
        result = jax.block_until_ready(function())
        seconds = time.perf_counter() - began
        return result, {"step": step, "seconds": seconds, "peak_gib": peak_gib()}

    config = config_for("llama", dtype="bfloat16", **(QUICK if quick else {}))
    model, figure = timed("initialisation", lambda: Transformer(config, rngs=nnx.Rngs(0)))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    yield figure | {"parameters": parameters}
    tools = ResidualTools(model)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(1, 50))
    out, figure = timed("run", lambda: run(model, tokens))
    yield figure
    middle = config.n_layers // 2
    for step, tool in {
        "residual_decomposition": lambda: tools.residual_decomposition(out, middle),
        "residual_movement": lambda: tools.residual_movement(tokens, 0, -1),
        "feature_attribution": lambda: tools.feature_attribution(tokens, 3),
        "feature_attribution again": lambda: tools.feature_attribution(tokens, 4),
    }.items():
        yield timed(step, tool)[1]


if __name__ == "__main__":
    for figure in measure(json.loads(sys.argv[1])):
        print(json.dumps(figure), flush=True)
