"""How do time and temporary memory grow with layers, tokens, batch and heads?

Random weights in the shape of GPT-2, of width 256. Of each program: seconds, cold compile time,
the rate of its products, and, along layers, the time of a layer's FLOP over that at 12 layers
(48 layers: at most 1.1). `compile_time` compares compile times.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arrakis_jax import Transformer, config_for, logit_attribution, residual_gradients
from benchmarks.cost import clocked, cold, medians
from benchmarks.options import Options
from benchmarks.workloads import AGAINST, TARGET, tokens

PROGRAMS = {
    "forward": lambda m, t: m(t, capture=("final",)),
    "head attribution, every position": lambda m, t: logit_attribution(
        m, t, jnp.roll(t, -1, 1), against=AGAINST, by="head", position=None
    ),
    "gradient, every site": lambda m, t: residual_gradients(m, t, TARGET, against=AGAINST),
}
SHAPE = dict(layers=12, tokens=64, batch=8, heads=4)
AXES: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "layers": ({}, (4, 12, 24, 48, 96)),
    "tokens": ({"batch": 1, "layers": 2}, (64, 128, 256, 512, 1024, 2048, 4096)),
    "batch": ({}, (1, 2, 4, 8, 16, 32)),
    "heads": ({}, (4, 8, 16, 32, 64)),
}
QUICK: dict[str, tuple[dict[str, int], tuple[int, ...]]] = {
    "layers": ({}, (12, 48)),
    "tokens": ({"batch": 1}, (16,)),
}
VOCABULARY = 1000
BASE, DEEP, AIM = 12, 48, 1.1


def inputs(width: int, shape: dict[str, int]) -> tuple[Transformer, jax.Array]:
    config = config_for(
        "gpt2", n_layer=shape["layers"], n_embd=width, n_head=shape["heads"],
        n_positions=shape["tokens"], vocab_size=VOCABULARY,
    )  # fmt: skip
    model = Transformer(config, rngs=nnx.Rngs(0))
    return model, jnp.asarray(tokens((shape["batch"], shape["tokens"]), VOCABULARY, 0))


def figures(options: Options) -> Iterator[dict[str, Any]]:
    width = 32 if options.quick else 256
    growth = {}
    for axis, (shape, values) in (QUICK if options.quick else AXES).items():
        arguments = {v: inputs(width, SHAPE | shape | {axis: v}) for v in values}
        for name, function in PROGRAMS.items():
            programs = {v: cold(function, *a) for v, a in arguments.items()}
            seconds = medians(
                options.repeats,
                {v: partial(clocked, programs[v].call, *a) for v, a in arguments.items()},
            )
            for v, program in programs.items():
                figure = {
                    "program": name,
                    "axis": axis,
                    "value": v,
                    "seconds": seconds[v],
                    "compile_seconds": program.seconds,
                    "gflop": program.flops / 1e9,
                    "gflop_per_second": program.flops / seconds[v] / 1e9,
                    "temporary_mb": program.temporary / 1e6,
                }
                if axis == "layers":
                    base = seconds[BASE] / programs[BASE].flops
                    growth[name, v] = seconds[v] / program.flops / base
                    figure["per_flop_over_12_layers"] = growth[name, v]
                yield figure
    for name in PROGRAMS:
        ratio = growth[name, DEEP]
        yield {
            "question": f"time per layer-FLOP, {DEEP} layers over {BASE}",
            "program": name,
            "ratio": ratio,
            "aim": AIM,
            "reached": ratio <= AIM,
        }
