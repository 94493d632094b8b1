"""Growth of anonymous memory while a checkpoint loads, as a share of the checkpoint's size.

python benchmarks/load_memory.py [--megabytes 500] [--family llama] [--json FILE]

Writes a random float32 checkpoint to a temporary folder and loads it in a fresh process, in which
a thread samples RssAnon of /proc/self/status (so Linux only). The bound is 1.35.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from flax import nnx
from report import report
from safetensors.numpy import save_file

from arrakis_jax import Transformer, config_for, from_pretrained
from arrakis_jax.checkpoint import export_weights

BOUND = 1.35
SHAPES = {
    "llama": dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "gpt2": dict(vocab_size=50257, n_embd=768, n_head=12),
}  # fmt: skip
LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer"}


def write_checkpoint(folder: Path, family: str, megabytes: int) -> int:
    """A random checkpoint of about this size, in one file; returns the file's bytes."""

    def make(n_layers: int) -> Transformer:
        config = config_for(family, **SHAPES[family] | {LAYERS[family]: n_layers})
        return Transformer(config, rngs=nnx.Rngs(0))

    def size(n_layers: int) -> int:
        return sum(
            4 * leaf.size for leaf in jax.tree.leaves(nnx.eval_shape(lambda: make(n_layers)))
        )

    n_layers = max(1, round((megabytes * 1e6 - size(0)) / (size(1) - size(0))))
    save_file(export_weights(family, make(n_layers)), folder / "model.safetensors")
    hf = SHAPES[family] | {LAYERS[family]: n_layers, "model_type": family}
    (folder / "config.json").write_text(json.dumps(hf))
    return (folder / "model.safetensors").stat().st_size


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(folder: str) -> dict[str, float]:
    """Loads in this process and watches its memory."""
    jax.block_until_ready(jnp.zeros(()))  # JAX's own start is no part of loading
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    model = jax.block_until_ready(from_pretrained(folder))
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"growth": max(peak[0], anonymous_bytes()) - before, "held": held, "seconds": seconds}


def main(
    megabytes: int = 500,
    family: str = "llama",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    child: Annotated[str | None, typer.Option(hidden=True)] = None,
):
    if child:
        print(json.dumps(measure(child)))
        return
    with tempfile.TemporaryDirectory() as name:
        size = write_checkpoint(Path(name), family, megabytes)
        command = [sys.executable, __file__, "--child", name]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(run.stdout)
    ratio = found["growth"] / size
    row = {
        "family": family,
        "checkpoint, MB": size / 1e6,
        "growth, MB": found["growth"] / 1e6,
        "ratio": ratio,
        "seconds": found["seconds"],
    }
    report("anonymous memory while loading", [row], json_file)
    if ratio > BOUND:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
