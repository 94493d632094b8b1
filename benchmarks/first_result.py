"""How long does it take from the start of a process to the first result, on GPT-2 small?

A fresh process imports the library, loads a native checkpoint, and computes the logit attribution
by head of a prompt, or of a batch: with an empty compilation cache, with one that another process
filled (aim: 5 seconds), and without one. Medians of processes, each phase apart.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fresh import fresh
from benchmarks.options import Options
from benchmarks.workloads import AGAINST, TARGET, WORKLOADS, tokens

SHAPES = ((1, 32), (8, 128))
PROCESSES = 3
AIM = 5.0


def figures(options: Options) -> Iterator[dict[str, Any]]:
    name = "tiny" if options.quick else "gpt2"
    checkpoint = native(name, options.work.resolve())

    def times(shape: tuple[int, int], place: str | None) -> dict[str, float]:
        about = (name, str(checkpoint), json.dumps(shape), str(time.time()))
        return next(fresh("first_result", *about, env=cache(place)))

    shapes = ((1, 4),) if options.quick else SHAPES
    times(shapes[0], None)  # fills the system's cache of files
    found: dict[tuple, list[dict[str, float]]] = {}
    for _ in range(1 if options.quick else PROCESSES):
        for shape in shapes:
            with tempfile.TemporaryDirectory() as folder:
                for kind, place in (("none", None), ("empty", folder), ("filled", folder)):
                    found.setdefault((shape, kind), []).append(times(shape, place))
    for (shape, kind), processes in found.items():
        phases = {key: statistics.median(p[key] for p in processes) for key in processes[0]}
        about = {"model": name, "tokens": "{} x {}".format(*shape), "compilation_cache": kind}
        figure = {**about, **phases}
        if kind == "filled":
            figure |= {"aim": AIM, "reached": figure["seconds"] <= AIM}
        yield figure


def cache(folder: str | None) -> dict[str, str]:
    """What a user sets to keep compiled programs."""
    if folder is None:
        return {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def native(name: str, work: Path) -> Path:
    """A random model of a workload's shape, saved once."""
    folder = work / f"{name}-native"
    if not (folder / "arrakis_jax.json").exists():
        from flax import nnx

        from arrakis_jax import Transformer, config_for, save

        workload = WORKLOADS[name]
        config = config_for(workload.family, **(workload.shape or {}), dtype=workload.dtype)
        save(Transformer(config, rngs=nnx.Rngs(0)), folder)
    return folder


def measure(name: str, checkpoint: str, shape: str, began: float) -> dict[str, float]:
    """In this process, which was started at `began`."""
    started = time.time()
    import numpy as np

    from arrakis_jax import from_pretrained, logit_attribution

    imported = time.time()
    model = from_pretrained(checkpoint)
    loaded = time.time()
    batch = tokens(json.loads(shape), model.config.vocab_size, 0)

    def call() -> None:
        np.asarray(logit_attribution(model, batch, TARGET, against=AGAINST, by="head").terms)

    call()
    done = time.time()
    call()
    return {
        "seconds": done - began,
        "start": started - began,
        "import": imported - started,
        "load": loaded - imported,
        "first_call": done - loaded,
        "second_call": time.time() - done,
    }


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:4], float(sys.argv[4]))))
