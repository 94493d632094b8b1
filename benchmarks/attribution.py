"""Time and temporary memory of attribution and patching, in forwards, on the device JAX finds.

python benchmarks/attribution.py [--json FILE] [--layers N]

GPT-2 small shape, random weights, float32, 8 pairs of prompts of 128 tokens; exact patching of one
pair of 32 tokens. The unit is a forward without the unembedding, of the same batch, in this run.
"""

import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from flax import nnx
from report import report

from arrakis_jax import (
    Logit,
    Transformer,
    attribution_patching,
    config_for,
    edge_attribution,
    feature_attribution,
    patch_sweep,
    residual_gradients,
    run,
)

NODES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "q", "k", "v", "z", "mlp_act")
GOAL = Logit(3, against=4)
JOBS = {
    "forward": lambda m, a, b: run(m, a, capture=("final",)),
    "gradient at every site": lambda m, a, b: residual_gradients(m, a, GOAL),
    "saliency": lambda m, a, b: feature_attribution(m, a, GOAL, method="saliency"),
    "integrated gradients, 32 steps": lambda m, a, b: feature_attribution(
        m, a, GOAL, method="integrated_gradients", steps=32
    ),
    "AtP, all nodes": lambda m, a, b: attribution_patching(m, a, b, GOAL, sites=NODES),
    "AtP* (QK fix), all nodes": lambda m, a, b: attribution_patching(
        m, a, b, GOAL, sites=NODES, method="atp_star"
    ),
    "EAP": lambda m, a, b: edge_attribution(m, a, b, GOAL),
    "EAP-IG, 5 steps": lambda m, a, b: edge_attribution(m, a, b, GOAL, steps=5, step_batch=1),
}
SWEEPS = {
    "forward": lambda m, a, b: run(m, a, capture=("final",)),
    "exact, resid_pre, layers x positions": lambda m, a, b: patch_sweep(m, a, b, GOAL),
    "exact, z, layers x heads": lambda m, a, b: patch_sweep(
        m, a, b, GOAL, sites="z", over=("layer", "head")
    ),
}


def measured(job, model: Transformer, pair: tuple) -> tuple[float, float]:
    """Median seconds of a call, and gigabytes of temporary memory."""
    compiled = jax.jit(job).lower(model, *pair).compile()
    jax.block_until_ready(compiled(model, *pair))
    times = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(compiled(model, *pair))
        times.append(time.perf_counter() - began)
    return float(np.median(times)), compiled.memory_analysis().temp_size_in_bytes / 1e9


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None, layers: int = 12
) -> None:
    model = Transformer(config_for("gpt2", n_layer=layers), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    rows = []
    for jobs, shape in ((JOBS, (8, 128)), (SWEEPS, (1, 32))):
        pair = tuple(jax.numpy.asarray(rng.integers(50257, size=shape)) for _ in range(2))
        forward = None
        for name, job in jobs.items():
            seconds, memory = measured(job, model, pair)
            forward = forward or seconds
            print(f"{name}: {seconds:.3g} s", flush=True)
            rows.append(
                {"job": name, "batch": f"{shape[0]} x {shape[1]}", "seconds": seconds,
                 "forwards": seconds / forward, "temporary memory, GB": memory}
            )  # fmt: skip
    report(f"attribution and patching, GPT-2 small shape, {layers} layers", rows, json_file)


if __name__ == "__main__":
    typer.run(main)
