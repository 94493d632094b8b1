"""How far from the limit is each job?

Time: the floating-point operations of its products (of the jaxpr; of a loop whose length is traced,
those that run) per second, as a share of what one large product does in the same run. Memory: what
XLA takes for it beyond arguments and results, against the least that its largest block needs.
Compile time by itself: with all caches empty, and with the persistent cache filled.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arrakis_jax import ModelConfig, Transformer, config_for, demo_model
from benchmarks.cost import cold, medians, persistent_cache, sustained
from benchmarks.options import Options
from benchmarks.ours import JOBS, State, state_of
from benchmarks.workloads import WORKLOADS
from tests.cost import flops

BACKWARD = (
    "gradient, every layer", "gradient, every site", "gradient x input", "integrated gradients",
    "attribution patching", "edge attribution patching",
)  # fmt: skip
COLUMNS = (
    "job", "seconds", "gflop_per_second", "share_of_gemm", "temporary_mb", "least_mb",
    "compile_seconds", "cached_compile_seconds",
)  # fmt: skip


def figures(options: Options) -> Iterator[dict[str, Any]]:
    for name in options.models:
        workload = WORKLOADS[name]
        if workload.shape is None:
            model = demo_model()[0]
        else:
            config = config_for(workload.family, dtype=workload.dtype, **workload.shape)
            model = Transformer(config, rngs=nnx.Rngs(0))
        state = state_of(model, workload)
        for job in options.jobs or JOBS:
            yield {"model": name, "job": job, **of_job(job, state, options.repeats)}


def of_job(job: str, state: State, repeats: int) -> dict[str, Any]:
    def program(model: Transformer) -> Any:
        return JOBS[job].run(replace(state, model=model))

    config, (b, t) = state.model.config, shape_of(job, state)
    compiled = cold(program, state.model)
    with tempfile.TemporaryDirectory() as folder, persistent_cache(folder):
        _, again = (seconds_to_compile(program, state.model) for _ in range(2))
    left, right = gemm_operands(config, b * t)
    gemm = jax.jit(lambda x, w: jnp.dot(x, w, precision=config.matmul_precision))
    seconds = medians(
        repeats,
        {
            "job": lambda: sustained(compiled.call, state.model),
            "gemm": lambda: sustained(gemm, left, right),
        },
    )
    products = executed(job, compiled.flops, state)
    rate = 2 * left.size * right.shape[1] / seconds["gemm"]
    return {
        "seconds": seconds["job"],
        "gflop": products / 1e9,
        "gflop_per_second": products / seconds["job"] / 1e9,
        "gemm_gflop_per_second": rate / 1e9,
        "share_of_gemm": products / seconds["job"] / rate,
        "temporary_mb": compiled.temporary / 1e6,
        "least_mb": least_memory(config, b, t, backward=job in BACKWARD) / 1e6,
        "compile_seconds": compiled.seconds,
        "cached_compile_seconds": again,
    }


def shape_of(job: str, state: State) -> tuple[int, int]:
    """The tokens of one pass of a job, `[B,T]`."""
    if job == "integrated gradients":
        b, t = state.integral.shape
        return 16 * b, t  # at once
    if job == "exact patching":
        b, t = state.sweep[0].shape
        return 16 * b, t
    if job == "edge attribution patching":
        return state.edges[0].shape
    return state.tokens.shape


def seconds_to_compile(program: Any, model: Transformer) -> float:
    jax.clear_caches()
    began = time.perf_counter()
    jax.jit(program).lower(model).compile()
    return time.perf_counter() - began


def executed(job: str, counted: int, state: State) -> int:
    """What runs of a program's products: a sweep's blocks are a loop from the cell's layer on."""
    if job != "exact patching":
        return counted
    model, (_, t) = state.model, state.sweep[0].shape
    x = jnp.zeros((len(state.sweep[0]), t), int)
    forward = flops_of_forward(model, x)
    return 2 * forward + (counted - 2 * forward) * (model.config.n_layers + 1) // 2


def flops_of_forward(model: Transformer, tokens: jax.Array) -> int:
    return flops(lambda m: m(tokens, capture=("final",)).residuals.final, model)


def gemm_operands(config: ModelConfig, n_tokens: int) -> tuple[jax.Array, jax.Array]:
    """A product of the size of the MLP's first, or of 512 tokens if there are fewer."""
    hidden = config.d_mlp or 4 * config.d_model
    key = jax.random.key(0)
    left = jax.random.normal(key, (max(n_tokens, 512), config.d_model), config.operands)
    return left, jax.random.normal(key, (config.d_model, hidden), config.operands)


def least_memory(config: ModelConfig, b: int, t: int, *, backward: bool) -> int:
    """Bytes of the widest moment of a block, beside the stream, and for the gradient the stream
    that entered each block and the same moment's gradients.

    In attention queries, keys, values, scores and what is mixed exist at once; in the MLP its input
    and hidden values.
    """
    size, d = jnp.dtype(config.acc).itemsize, config.d_model
    heads = 2 * config.n_heads + 2 * config.n_kv_heads
    attention = b * t * heads * config.d_head + b * config.n_heads * t * t
    mlp = b * t * (d + (1 + config.gated) * config.d_mlp)
    stream, widest = b * t * d, max(attention, mlp)
    if not backward:
        return size * (2 * stream + widest)
    return size * ((config.n_layers + 2) * stream + 2 * widest)
