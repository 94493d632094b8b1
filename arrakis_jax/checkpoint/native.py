"""Native checkpoints: the weights as Orbax writes them, and the config in a JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from arrakis_jax.checkpoint.files import NATIVE_CONFIG, NATIVE_WEIGHTS, read_json
from arrakis_jax.checkpoint.parameters import assembled_model, named, parameters, sharding
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import CheckpointError, expected
from arrakis_jax.nn.transformer import Transformer

# Raised when the file of the config changes. Fields that an old file lacks have their defaults.
FORMAT = 1
# Bytes read at once. The allocator keeps smaller buffers, and they add up.
_CHUNK_BYTES = 1 << 26


def save(model: Transformer, path: str | Path) -> None:
    """Writes a native checkpoint, restorable by `from_pretrained`, also onto another mesh.

    Args:
        model: the transformer.
        path: a folder that does not exist yet, or is empty.

    Raises:
        FileExistsError: if there is something at `path`.
    """
    import orbax.checkpoint as ocp

    if not isinstance(model, Transformer):
        do = "pass the model first"
        raise TypeError(expected("model", "a Transformer", type(model).__name__, do))
    folder = new_folder(path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = named(model)
    chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in weights}
    # Weights hardly compress, and are read faster without.
    with ocp.PyTreeCheckpointer(use_compression=False) as checkpointer:
        checkpointer.save(folder / NATIVE_WEIGHTS, weights, save_args=chunks)
    # Written last: a folder without it is not a checkpoint.
    content = {"format": FORMAT, "config": asdict(model.config)}
    (folder / NATIVE_CONFIG).write_text(json.dumps(content, indent=1))


def new_folder(path: str | Path, *, name: str = "path") -> Path:
    """The path, made absolute.

    Raises:
        FileExistsError: if there is something at `path`.
    """
    if not isinstance(path, str | Path):
        raise TypeError(expected(name, "a path", repr(path), "give a folder"))
    folder = Path(path).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        do = "remove it, or choose another"
        raise FileExistsError(expected(name, "a new or empty folder", repr(str(path)), do))
    return folder


def native_config(folder: Path) -> ModelConfig:
    """The config of a native checkpoint."""
    file = folder / NATIVE_CONFIG
    content = read_json(file, "a checkpoint made by `save`")
    if content.get("format") != FORMAT:
        do = "read it with the version of arrakis_jax that wrote it, or convert it again"
        raise CheckpointError(expected("format", str(FORMAT), repr(content.get("format")), do))
    try:
        return ModelConfig(**content["config"])
    except (KeyError, TypeError, ValueError) as error:
        do = f"save it again with this version ({error})"
        raise CheckpointError(expected(file.name, "a ModelConfig", "another one", do)) from None


def restore(folder: Path, config: ModelConfig, mesh: Mesh | None) -> Transformer:
    """The model of a native checkpoint, in the dtype of `config`."""
    import orbax.checkpoint as ocp

    params, _ = parameters(config)
    wanted = {name: leaf.shape for name, leaf in params.items()}
    target = {name: _target(name, leaf, mesh) for name, leaf in params.items()}
    place = folder.absolute() / NATIVE_WEIGHTS
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # Orbax does not compare shapes when it restores to host memory.
            metadata = checkpointer.metadata(place).item_metadata
            if metadata is None:
                raise ValueError("its metadata cannot be read")
            stored = {name: tuple(array.shape) for name, array in dict(metadata).items()}
            if stored != wanted:
                wrong = {n for n, _ in stored.items() ^ wanted.items()}
                raise ValueError(
                    "; ".join(f"{n}: {stored.get(n)}, not {wanted.get(n)}" for n in sorted(wrong))
                )
            weights = checkpointer.restore(place, target)
    except (OSError, KeyError, ValueError) as error:
        must, do = "the folder that `save` wrote", f"copy it again ({error})"
        got = "one that does not fit the config or cannot be read"
        raise CheckpointError(expected(NATIVE_WEIGHTS, must, got, do)) from error
    return assembled_model(config, mesh, lambda name, _, to: jax.device_put(weights.pop(name), to))


def _target(name: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh | None) -> Any:
    """What Orbax restores a parameter to: host memory, or its place on the mesh."""
    if mesh is None:
        # Orbax needs an array for its shape and dtype; this one has a single element in memory.
        return np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)
    to = sharding(name, leaf.shape, mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to)
