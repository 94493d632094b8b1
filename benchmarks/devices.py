"""Do several devices give one device's numbers, and what do they exchange?

On virtual CPU devices, which share the machine's cores: numbers and collectives, no speed. A mesh
is data x model: `model` divides heads and hidden widths as `checkpoint.partition` says. Collectives
count as often as they are run (a loop's body once a layer), bytes are what one device receives.
"""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.fresh import fresh
from benchmarks.options import Options
from benchmarks.workloads import AGAINST, TARGET, following, tokens

DEVICES = 8
MESHES = (
    (2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2),
)  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
SHAPE = dict(n_layer=12, n_embd=256, n_head=8, n_positions=64, vocab_size=1024)
QUICK = SHAPE | dict(n_layer=2, n_embd=32)

COMPUTATION = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
EXCHANGE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
ARRAY = re.compile(r"\b([a-z]+)(\d+)\[([\d,]*)\]")
INSIDE = re.compile(r"(?:body|to_apply|calls|branch_computations)=\{?((?:%[\w.-]+(?:, )?)+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def figures(options: Options) -> Iterator[dict[str, Any]]:
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    env = {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    yield from fresh("devices", json.dumps(options.quick), env=env)


def programs() -> dict[str, Callable]:
    """Of a model and the arrays of `inputs`; each returns what is compared."""
    from arrakis_jax import Logit, attribution_patching, logit_attribution, residual_gradients

    def attribution(m, clean, corrupt, following):
        found = logit_attribution(
            m, clean, following, against=AGAINST, by="head", position=None
        )  # fmt: skip
        return found.terms, found.logit

    def gradients(m, clean, corrupt, following):
        found = residual_gradients(m, clean, TARGET, against=AGAINST)
        return found.resid_pre, found.resid_mid, found.final

    return {
        "forward": lambda m, clean, corrupt, following: m(clean).logits,
        "head attribution, every position": attribution,
        "gradient, every site": gradients,
        "attribution patching": lambda m, clean, corrupt, following: (
            attribution_patching(m, clean, corrupt, Logit(TARGET, against=AGAINST)).effects
        ),
    }


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    import jax
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from arrakis_jax import Transformer, config_for
    from arrakis_jax.checkpoint import partition

    model = Transformer(config_for("gpt2", **(QUICK if quick else SHAPE)), rngs=nnx.Rngs(0))
    size = model.config.vocab_size
    clean, corrupt = (tokens((8, 16 if quick else 64), size, seed) for seed in (0, 1))
    inputs = (clean, corrupt, following(clean))
    paths, structure = jax.tree_util.tree_flatten_with_path(model)

    def on(mesh) -> tuple:
        def place(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            spec = partition(name, leaf.shape, mesh)
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        rows = NamedSharding(mesh, PartitionSpec("data"))
        divided = jax.tree.unflatten(structure, [place(*item) for item in paths])
        return divided, *(jax.device_put(x, rows) for x in inputs)

    for name, program in programs().items():
        alone = jax.jit(program)(model, *inputs)
        for shape in ((2, 4),) if quick else MESHES:
            devices = jax.devices()[: math.prod(shape)]
            axes = (AxisType.Auto,) * 2
            mesh = jax.make_mesh(shape, ("data", "model"), axis_types=axes, devices=devices)
            arguments = on(mesh)
            compiled = jax.jit(program).lower(*arguments).compile()
            count, received = collectives(compiled.as_text())
            yield {
                "program": name,
                "devices": len(devices),
                "data": shape[0],
                "model": shape[1],
                "difference": difference(compiled(*arguments), alone),
                **{kind.replace("-", "_"): count[kind] for kind in COLLECTIVES},
                "received_mb": received / 1e6,
            }


def difference(found: Any, wanted: Any) -> float:
    """The largest, over the arrays of a result, in shares of an array's largest value."""
    import jax

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / np.abs(b).max()) for a, b in pairs)


def collectives(hlo: str) -> tuple[Counter[str], int]:
    """How often each kind is run in a compiled program, and the bytes that they give a device."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in hlo.splitlines():
        if head := COMPUTATION.match(line):
            lines = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    count: Counter[str] = Counter()
    received = 0

    def walk(name: str, times: int) -> None:
        nonlocal received
        for line in bodies[name]:
            if exchange := EXCHANGE.search(line):
                count[exchange[2]] += times
                received += times * sum(
                    max(1, int(bits) // 8) * math.prod(int(n) for n in shape.split(",") if n)
                    for _, bits, shape in ARRAY.findall(exchange[1])
                )
            elif inside := INSIDE.search(line):
                trips = TRIPS.search(line)
                for called in inside[1].replace("%", "").removesuffix(", ").split(", "):
                    walk(called, times * (int(trips[1]) if trips else 1))

    walk(entry, 1)
    return count, received


if __name__ == "__main__":
    for figure in measure(json.loads(sys.argv[1])):
        print(json.dumps(figure), flush=True)
