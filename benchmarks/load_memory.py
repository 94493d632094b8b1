"""How much anonymous memory does loading a checkpoint take? At most 1.35 times its size.

A random float32 checkpoint is loaded in a fresh process, in which a thread samples RssAnon of
/proc/self/status (so Linux only).
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.fresh import fresh
from benchmarks.options import Options

AIM = 1.35
SHAPES = {
    "llama": dict(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "gpt2": dict(vocab_size=50257, n_embd=768, n_head=12),
}  # fmt: skip
LAYERS = {"llama": "num_hidden_layers", "gpt2": "n_layer"}
MEGABYTES = 500


def figures(options: Options) -> Iterator[dict[str, Any]]:
    for family in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            size = write_checkpoint(Path(folder), family, options.quick)
            (found,) = fresh("load_memory", folder)
        ratio = found["growth"] / size
        yield {
            "family": family,
            "checkpoint_mb": size / 1e6,
            "growth_mb": found["growth"] / 1e6,
            "held_mb": found["held"] / 1e6,
            "seconds": found["seconds"],
            "ratio": ratio,
            "aim": AIM,
            "reached": ratio <= AIM,
        }


def write_checkpoint(folder: Path, family: str, quick: bool) -> int:
    """A random checkpoint of about `MEGABYTES`, in one file; returns the file's bytes."""
    import jax
    from flax import nnx
    from safetensors.numpy import save_file

    from arrakis_jax import Transformer, config_for
    from arrakis_jax.checkpoint import export_weights

    shape = SHAPES[family]

    def make(n_layers: int) -> Transformer:
        config = config_for(family, **shape | {LAYERS[family]: n_layers})
        return Transformer(config, rngs=nnx.Rngs(0))

    def size(n_layers: int) -> int:
        model = nnx.eval_shape(lambda: make(n_layers))
        return sum(4 * leaf.size for leaf in jax.tree.leaves(model))

    room = 0 if quick else MEGABYTES * 1e6 - size(0)
    n_layers = max(1, round(room / (size(1) - size(0))))
    save_file(export_weights(family, make(n_layers)), folder / "model.safetensors")
    hf = shape | {LAYERS[family]: n_layers, "model_type": family}
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

    from arrakis_jax import from_pretrained

    jax.block_until_ready(jnp.zeros(()))  # JAX's own start is no part of loading
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    model = jax.block_until_ready(from_pretrained(folder))
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    return {"growth": max(peak[0], anonymous_bytes()) - before, "held": held, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
