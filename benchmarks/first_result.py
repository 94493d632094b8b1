"""How long does it take from the start of a process to the first result, on GPT-2 small?

A fresh process imports the library, loads a native checkpoint, and computes the logit attribution
by head of a batch: with an empty compilation cache, with one that an earlier process filled (aim:
5 seconds), and without one. Medians of processes, each phase apart.
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

PROCESSES = 3
AIM = 5.0


def figures(options: Options) -> Iterator[dict[str, Any]]:
    name = "tiny" if options.quick else "gpt2"
    checkpoint = native(name, options.work.resolve())

    def times(place: str | None) -> dict[str, float]:
        began = str(time.time())
        return next(fresh("first_result", name, str(checkpoint), began, env=cache(place)))

    times(None)  # fills the system's cache of files
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(1 if options.quick else PROCESSES):
        with tempfile.TemporaryDirectory() as folder:
            for kind, place in (("none", None), ("empty", folder), ("filled", folder)):
                found.setdefault(kind, []).append(times(place))
    for kind, processes in found.items():
        phases = {key: statistics.median(p[key] for p in processes) for key in processes[0]}
        figure = {"model": name, "compilation_cache": kind, **phases}
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


def measure(name: str, checkpoint: str, began: float) -> dict[str, float]:
    """In this process, which was started at `began`."""
    started = time.time()
    import numpy as np

    from arrakis_jax import from_pretrained, logit_attribution

    imported = time.time()
    model = from_pretrained(checkpoint)
    loaded = time.time()
    batch = tokens(WORKLOADS[name].batch, model.config.vocab_size, 0)

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
    print(json.dumps(measure(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
