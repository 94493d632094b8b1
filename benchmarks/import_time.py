"""How much longer than `import jax, flax.nnx` does `import arrakis_jax` take? At most 1.3 times.

Median seconds of fresh processes.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.cost import medians
from benchmarks.options import Options

STATEMENTS = {"jax and flax": "import jax, flax.nnx", "arrakis_jax": "import arrakis_jax"}
AIM = 1.3


def figures(options: Options) -> Iterator[dict[str, Any]]:
    calls = {name: partial(seconds, statement) for name, statement in STATEMENTS.items()}
    found = medians(1 if options.quick else 2 * options.repeats, calls)
    yield {"import": "jax and flax", "seconds": found["jax and flax"]}
    ratio = found["arrakis_jax"] / found["jax and flax"]
    yield {
        "import": "arrakis_jax", "seconds": found["arrakis_jax"], "ratio": ratio, "aim": AIM,
        "reached": ratio <= AIM,
    }  # fmt: skip


def seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began
