"""Checkpoints: Hugging Face folders and hub ids in, the native form (Orbax) in and out."""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from arrakis_jax.config import ModelConfig, RopeScaling
from arrakis_jax.errors import CheckpointError, expected
from arrakis_jax.families import family_for
from arrakis_jax.families.base import Family, Rule
from arrakis_jax.nn.transformer import Transformer

NATIVE = "arrakis_jax.json"
DTYPES = ("float32", "bfloat16", "float64")
_STORED = {"F64": "float64", "F32": "float32", "F16": "float32", "BF16": "bfloat16"}
# The parameter's axis that the mesh axis "model" divides, counted from the right.
_SHARDED_AXIS = {
    "w_q": -2, "w_k": -2, "w_v": -2, "w_o": -3, "b_q": -2, "b_k": -2, "b_v": -2,
    "w_in": -1, "w_gate": -1, "w_out": -2, "b_in": -1, "b_gate": -1, "w_e": -2, "w_u": -1, "b_u": -1,
}  # fmt: skip


def from_pretrained(
    path_or_repo_id: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
) -> Transformer:
    """A Transformer from a checkpoint; torch is never imported.

    Args:
        path_or_repo_id: a folder with config.json and safetensors as Hugging Face writes them, a
            folder written by `save`, or a hub id (fetched by huggingface_hub, whose offline mode
            is honoured).
        dtype: "float32", "bfloat16", or under x64 "float64"; None keeps the stored dtype (float16
            becomes float32).
        mesh: a mesh with an axis "model", over which heads, MLP widths and the vocabulary are
            divided where they can be; None for the default device.
        revision: of a hub id.

    Raises:
        CheckpointError: listing everything that is wrong: an unsupported model_type or config
            field, missing, extra or mis-shaped tensors, broken files.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(expected("dtype", f"one of {DTYPES}", repr(dtype), "choose one"))
    folder = _folder(path_or_repo_id, revision)
    if (folder / NATIVE).exists():
        return _restore(folder, dtype, mesh)
    settings = _json(folder / "config.json")
    family = family_for(settings.get("model_type"))
    with ExitStack() as stack:
        tensors = _Tensors(folder, family, stack)
        stored = dtype or tensors.stored_dtype()
        _check_x64(stored)
        return _fill(family, family.config(settings, stored), tensors, mesh)


def _folder(path_or_repo_id: str | Path, revision: str | None) -> Path:
    folder = Path(path_or_repo_id).expanduser()
    if folder.is_dir():
        return folder
    source = str(path_or_repo_id)
    must = "an existing folder or a hub id that can be reached"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise CheckpointError(
            expected("path_or_repo_id", must, repr(source), "there is no such folder")
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        do = f"there is no such folder, and the hub gave: {str(error).splitlines()[0]}"
        raise CheckpointError(expected("path_or_repo_id", must, repr(source), do)) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        do = "point at a folder with config.json and *.safetensors"
        must, got = f"a checkpoint with {path.name}", f"{str(path.parent)!r} without"
        raise CheckpointError(expected("path_or_repo_id", must, got, do)) from None
    except (ValueError, OSError) as error:
        do = "fetch it again"
        raise CheckpointError(expected(path.name, "readable JSON", str(error), do)) from error
    if not isinstance(content, dict):
        got, do = type(content).__name__, "fetch it again"
        raise CheckpointError(expected(path.name, "a JSON object", got, do))
    return content


class _Tensors:
    """The tensors of a Hugging Face folder by their full names, read one at a time."""

    def __init__(self, folder: Path, family: Family, stack: ExitStack):
        self.files = {name: _open(path, stack) for name, path in _shards(folder).items()}
        listed = [(name, key) for name, file in self.files.items() for key in file.keys()]  # noqa: SIM118
        self.where: dict[str, tuple[str, str]] = {}
        for name, key in listed:
            full = key
            if family.prefix and not key.startswith((family.prefix, family.tied_copy)):
                full = family.prefix + key
            if not any(re.fullmatch(pattern, full) for pattern in family.buffers):
                self.where[full] = (name, key)

    def slice(self, tensor: str) -> Any:
        """A view of a tensor's header and data."""
        name, key = self.where[tensor]
        return self.files[name].get_slice(key)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self.slice(tensor).get_shape())

    def get(self, tensor: str) -> np.ndarray:
        """A tensor's values."""
        name, key = self.where[tensor]
        return self.files[name].get_tensor(key)

    def stored_dtype(self) -> str:
        """The widest dtype stored."""
        kinds = {self.slice(tensor).get_dtype() for tensor in self.where}
        unknown = sorted(kinds - _STORED.keys())
        if unknown or not kinds:
            must, do = f"made of {tuple(_STORED)} tensors", "quantized checkpoints are not read"
            raise CheckpointError(expected("checkpoint", must, unknown or "no tensors", do))
        return str(max((_STORED[kind] for kind in kinds), key=lambda d: jnp.dtype(d).itemsize))


def _shards(folder: Path) -> dict[str, Path]:
    """The safetensors files of a folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {single.name: single}
    if not index.exists():
        do = "torch .bin files are not read; convert with save_pretrained"
        must, got = "a folder with model.safetensors or its index", f"{str(folder)!r} without"
        raise CheckpointError(expected("path_or_repo_id", must, got, do))
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        do = "fetch it again"
        raise CheckpointError(expected(index.name, "an object with weight_map", "none", do))
    shards, problems = {}, []
    for name in sorted({str(value) for value in weight_map.values()}):
        path = folder / name
        # Shards lie beside their index; hub caches make them links to elsewhere.
        if Path(name).name != name:
            do = "do not trust this checkpoint"
            must = f"naming files of its own folder, {str(folder)!r}"
            problems.append(expected(index.name, must, repr(name), do))
        elif not path.exists():
            do = "fetch it again"
            problems.append(expected(index.name, "naming files that exist", repr(name), do))
        shards[name] = path
    if problems:
        raise CheckpointError("\n".join(problems))
    return shards


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        do = "the file is truncated or broken; fetch it again"
        must = "a whole safetensors file"
        raise CheckpointError(expected(path.name, must, str(error), do)) from error


def _check_x64(dtype: str) -> None:
    if dtype == "float64" and not jax.config.jax_enable_x64:
        do = "call jax.config.update('jax_enable_x64', True) first"
        raise ValueError(expected("dtype", "float64 only under x64", "x64 off", do))


def _skeleton(config: ModelConfig) -> Transformer:
    """The model's structure and shapes, without arrays."""
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))


def _leaves(model: Transformer) -> dict[str, Any]:
    """The parameters of a model (arrays or shapes) by their dotted names."""
    paths, _ = jax.tree_util.tree_flatten_with_path(model)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in paths
    }


def _plan(
    family: Family, config: ModelConfig, parameters: dict[str, Any]
) -> Iterator[tuple[Rule, list[tuple[str, int | None]]]]:
    """Each rule that this config needs, with its tensors and their layers."""
    for rule in family.rules:
        if set(rule.parameters) <= parameters.keys():
            per_layer = "{l}" in rule.tensor
            layers = range(config.n_layers) if per_layer else (None,)
            yield rule, [(rule.tensor.format(l=layer), layer) for layer in layers]


def _fill(family: Family, config: ModelConfig, tensors: _Tensors, mesh: Mesh | None) -> Transformer:
    model = _skeleton(config)
    parameters = _leaves(model)
    plan = list(_plan(family, config, parameters))
    _check_tensors(family, config, tensors, plan)

    def size(entry: tuple[Rule, Any]) -> int:
        return int(np.prod(entry[0].shape(config)))

    placed: dict[str, jax.Array] = {}
    # The largest tensors first: what is read beside the stacks then never adds to the peak.
    for rule, found in sorted(plan, key=size, reverse=True):
        stacks = [_aligned(parameters[name].shape, config.dtype) for name in rule.parameters]
        for tensor, layer in found:
            for stack, value in zip(stacks, rule.read(tensors.get(tensor), config), strict=True):
                stack[... if layer is None else layer] = value
        for name, stack in zip(rule.parameters, stacks, strict=True):
            placed[name] = _place(name, stack, mesh)
    return jax.tree.unflatten(jax.tree.structure(model), [placed[name] for name in parameters])


def _check_tensors(
    family: Family, config: ModelConfig, tensors: _Tensors, plan: list[tuple[Rule, list]]
) -> None:
    """Raises one error that lists every missing, mis-shaped and extra tensor."""
    wanted = {tensor: rule.shape(config) for rule, found in plan for tensor, _ in found}
    problems = []
    for tensor, shape in wanted.items():
        if tensor not in tensors.where:
            problems.append(f"missing: {tensor} must be there with shape {shape}, got none")
        elif tensors.shape(tensor) != shape:
            got = tensors.shape(tensor)
            problems.append(f"mis-shaped: {tensor} must be of shape {shape}, got {got}")
    for tensor in sorted(tensors.where.keys() - wanted.keys()):
        if not (tensor == family.tied_copy and config.tied and _is_copy(family, tensors, wanted)):
            problems.append(f"extra: {tensor} must be absent, got {tensors.shape(tensor)}")
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(
            f"the tensors must be those of a {family.name} with this config.json, got "
            f"{len(problems)} that differ; check that they belong together:\n  {lines}"
        )


def _is_copy(family: Family, tensors: _Tensors, wanted: dict) -> bool:
    """Whether a tied checkpoint's unembedding repeats its embedding."""
    embedding = next(r.tensor for r in family.rules if r.parameters == ("w_e",))
    if embedding not in tensors.where or tensors.shape(embedding) != tensors.shape(
        family.tied_copy
    ):
        return False
    return bool(np.array_equal(tensors.get(embedding), tensors.get(family.tied_copy)))


def _aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An empty array that JAX on CPU can take over without a copy: aligned to 64 bytes."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    count = int(np.prod(shape)) * np.dtype(kind).itemsize
    buffer = np.empty(count + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + count].view(kind).reshape(shape)


def _place(name: str, value: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(value, may_alias=True)
    sharding = NamedSharding(mesh, partition(name, value.shape, mesh))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is divided over the mesh axis "model"; replicated if it does not divide."""
    axis = _SHARDED_AXIS.get(name.split(".")[-1])
    if axis is None or "model" not in mesh.shape or shape[axis] % mesh.shape["model"]:
        return PartitionSpec()
    names: list[str | None] = [None] * len(shape)
    names[axis] = "model"
    return PartitionSpec(*names)


def export_weights(family: str, model: Transformer) -> dict[str, np.ndarray]:
    """The model's parameters as the tensors of a Hugging Face checkpoint of this family."""
    parameters = _leaves(model)
    tensors = {}
    for rule, found in _plan(family_for(family), model.config, parameters):
        values = [np.asarray(parameters[name]) for name in rule.parameters]
        for tensor, layer in found:
            parts = [value if layer is None else value[layer] for value in values]
            tensors[tensor] = rule.write(parts, model.config)
    return tensors


def save(model: Transformer, path: str | Path) -> None:
    """Writes the native checkpoint: the config as JSON and the parameters by Orbax.

    `from_pretrained(path)` restores it, on any mesh.

    Raises:
        FileExistsError: if there is something at `path` already.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        do = "choose another"
        raise FileExistsError(expected("path", "a new or empty folder", repr(str(path)), do))
    folder.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "parameters", _leaves(model))
    content = {"format": 1, "config": dataclasses.asdict(model.config)}
    (folder / NATIVE).write_text(json.dumps(content, indent=1) + "\n")


def _restore(folder: Path, dtype: str | None, mesh: Mesh | None) -> Transformer:
    import orbax.checkpoint as ocp

    fields = _json(folder / NATIVE)["config"]
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    config = ModelConfig(**fields | ({} if dtype is None else {"dtype": dtype}))
    _check_x64(config.dtype)
    model = _skeleton(config)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = device
        if mesh is not None:
            sharding = NamedSharding(mesh, partition(name, leaf.shape, mesh))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    targets = {name: target(name, leaf) for name, leaf in _leaves(model).items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            values = checkpointer.restore(folder.absolute() / "parameters", targets)
    except (ValueError, OSError, KeyError) as error:
        do = "save it again"
        must, got = "a whole native checkpoint", str(error)
        raise CheckpointError(expected("path_or_repo_id", must, got, do)) from error
    return jax.tree.unflatten(jax.tree.structure(model), [values[name] for name in targets])
