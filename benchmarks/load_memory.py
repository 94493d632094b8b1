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

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

BOUND = 1.35
SHAPES = {
    "llama": dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "gpt2": dict(vocab_size=50257, n_embd=768, n_head=12),
}  # fmt: skip
LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer"}


def write_checkpoint(folder: Path, family_name: str, megabytes: int) -> int:
    """A random checkpoint of about this size, in one file; returns the file's bytes."""
    from arrakis_jax.families import family_for

    family = family_for(family_name)
    rng = np.random.default_rng(0)

    def tensors(n_layers: int) -> dict[str, tuple[int, ...]]:
        config = family.config(SHAPES[family_name] | {LAYERS[family_name]: n_layers})
        shapes = {}
        for rule in family.rules:
            if rule.params[0] == "w_u" and config.tied or "_proj.bias" in rule.tensor[-9:]:
                continue
            for layer in range(n_layers if "{l}" in rule.tensor else 1):
                shapes[rule.tensor.replace("{l}", str(layer))] = rule.shape(config)
        return shapes

    def size(n_layers: int) -> int:
        return sum(4 * int(np.prod(shape)) for shape in tensors(n_layers).values())

    n_layers = max(1, round((megabytes * 1e6 - size(0)) / (size(1) - size(0))))
    weights = {
        name: rng.standard_normal(shape, np.float32) for name, shape in tensors(n_layers).items()
    }
    save_file(weights, folder / "model.safetensors")
    hf = SHAPES[family_name] | {LAYERS[family_name]: n_layers, "model_type": family_name}
    (folder / "config.json").write_text(json.dumps(hf))
    return (folder / "model.safetensors").stat().st_size


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def measure(folder: str) -> dict[str, float]:
    """Loads in this process and watches its memory."""
    import jax
    import jax.numpy as jnp

    from arrakis_jax.checkpoint import from_pretrained

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
    result = {"family": family, "checkpoint": size} | json.loads(run.stdout)
    result["ratio"] = result["growth"] / size
    table = Table("family", "checkpoint MB", "growth MB", "ratio", "bound", "seconds")
    megabyte = {key: f"{result[key] / 1e6:.0f}" for key in ("checkpoint", "growth")}
    table.add_row(
        family, *megabyte.values(), f"{result['ratio']:.3f}", str(BOUND), f"{result['seconds']:.2f}"
    )
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(result, indent=1))
    if result["ratio"] > BOUND:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
