"""Does compile time grow with depth? At 48 layers over 4; at most 1.5."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arrakis_jax import Transformer, config_for, logit_attribution, residual_gradients
from benchmarks.cost import cold
from benchmarks.options import Options
from benchmarks.workloads import AGAINST, TARGET

PROGRAMS: dict[str, Callable] = {
    "forward": lambda m, t: m(t),
    "head attribution, every position": lambda m, t: logit_attribution(
        m, t, jnp.roll(t, -1, 1), against=AGAINST, by="head", position=None
    ),
    "gradient, every site": lambda m, t: residual_gradients(m, t, TARGET, against=AGAINST),
}
SHALLOW, DEEP, AIM = 4, 48, 1.5


def figures(options: Options) -> Iterator[dict[str, Any]]:
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    models = {layers: abstract(layers) for layers in (SHALLOW, DEEP)}
    repeats = 1 if options.quick else options.repeats
    for name, program in PROGRAMS.items():
        times: dict[int, list[float]] = {layers: [] for layers in models}
        for _ in range(repeats):
            for layers, model in models.items():
                times[layers].append(cold(program, model, tokens).seconds)
        shallow, deep = (statistics.median(times[layers]) for layers in models)
        yield {
            "program": name,
            f"seconds_{SHALLOW}_layers": shallow,
            f"seconds_{DEEP}_layers": deep,
            "ratio": deep / shallow,
            "aim": AIM,
            "reached": deep / shallow <= AIM,
        }


def abstract(layers: int) -> Transformer:
    config = config_for("gpt2", n_layer=layers, n_embd=64, n_head=4, vocab_size=1000)
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
