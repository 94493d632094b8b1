"""Checkpoints: Hugging Face folders and hub ids in, native ones (Orbax) in and out.

Tensors are memory-mapped and copied once, into one array per stacked parameter, which JAX then uses
as it is: on a CPU, loading takes the size of the model in memory. Nothing here imports torch.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open

from arrakis_jax.axes import Array
from arrakis_jax.config import ModelConfig, RopeScaling
from arrakis_jax.errors import CheckpointError, expected
from arrakis_jax.families import family_for
from arrakis_jax.families.base import Family, Rule
from arrakis_jax.nn.transformer import Transformer

NATIVE_CONFIG = "arrakis_jax.json"
NATIVE_WEIGHTS = "weights"
FORMAT = 1  # of the native config
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", f"{NATIVE_WEIGHTS}/*")
STORED = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
ALIGNMENT = 64  # bytes; JAX copies a host array that is not aligned to it

# The mesh axis of each axis of a parameter, without the layer axis, by the last part of its name.
# Parameters that are not named here are whole on every device.
SHARDED = {
    "w_e": ("model", None),
    "w_u": (None, "model"),
    "b_u": ("model",),
    "w_q": (None, "model", None),
    "w_k": (None, "model", None),
    "w_v": (None, "model", None),
    "w_o": ("model", None, None),
    "b_q": ("model", None),
    "b_k": ("model", None),
    "b_v": ("model", None),
    "w_in": (None, "model"),
    "w_gate": (None, "model"),
    "w_out": ("model", None),
    "b_in": ("model",),
    "b_gate": ("model",),
}


def from_pretrained(
    path_or_repo_id: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    stream_dtype: Literal["bfloat16"] | None = None,
    matmul_precision: Literal["highest", "high", "default"] | None = None,
) -> Transformer:
    """A model from a Hugging Face checkpoint in safetensors, or from one made by `save`.

    Args:
        path_or_repo_id: a local folder, or a hub id (HF_HUB_OFFLINE is honoured).
        dtype: "float32", "bfloat16", or "float64" under x64. By default as stored: the widest of
            the weights' own, and float32 for float16.
        mesh: where to put the parameters: heads, MLP units and vocabulary over its axis "model" if
            it has one and they divide, everything else on every device. Its axes are used as Auto,
            also where they are Explicit.
        revision: branch, tag or commit of a hub id.
        stream_dtype: "bfloat16" rounds the residual stream to it (see ModelConfig).
        matmul_precision: of float32 products; "highest" unless a checkpoint made by `save` says
            otherwise. "high" and "default" buy speed on TPUs and GPUs.

    Returns:
        The model, its weights neither folded nor centred.

    Raises:
        CheckpointError: listing every tensor that is missing, left over or of another shape, and
            every config field that is not supported.
        ValueError: for another dtype.
        TypeError: for a path or a mesh that is none.
    """
    dtype = None if dtype is None else _checked_dtype(dtype)
    mesh = _auto(mesh)
    folder = local_folder(path_or_repo_id, revision=revision)
    compute = {"stream_dtype": stream_dtype, "matmul_precision": matmul_precision}
    compute = {name: value for name, value in compute.items() if value is not None}
    if (folder / NATIVE_CONFIG).is_file():
        return _restore(folder, dtype, mesh, compute)
    family, config = _hf_config(folder)
    tensors = _with_prefix(_open(folder), family)
    plan = _plan(family, config, tensors)
    dtype = dtype or _checked_dtype(
        _widest({tensors[n].dtype for _, ns in plan.values() for n in ns})
    )
    config = replace(config, dtype=dtype, **compute)

    def filled(name: str, shape: tuple[int, ...], sharding: Sharding | None) -> Array:
        rule, names = plan[name]
        stack = _aligned(shape, np.dtype(dtype))
        for layer, tensor in zip(stack if "{l}" in rule.tensor else [stack], names, strict=True):
            layer[...] = rule.part(tensors[tensor].array, name, config).reshape(layer.shape)
        # Waiting keeps at most one array in the host's memory beside those of an accelerator.
        return jax.block_until_ready(jax.device_put(stack, sharding))

    return _assembled(config, mesh, filled)


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
    folder = Path(path).absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        do = "remove it, or choose another"
        raise FileExistsError(expected("path", "a new or empty folder", repr(str(path)), do))
    folder.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / NATIVE_WEIGHTS, {_name(path): leaf for path, leaf in leaves})
    # Written last: a folder without it is not a checkpoint.
    about = {"format": FORMAT, "config": asdict(model.config)}
    (folder / NATIVE_CONFIG).write_text(json.dumps(about, indent=1))


def export_weights(family: str, model: Transformer) -> dict[str, np.ndarray]:
    """The model's parameters as the tensors of a Hugging Face checkpoint of this family."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    params = {_name(path): np.asarray(leaf) for path, leaf in leaves}
    tensors = {}
    for rule in family_for(family).rules:
        if rule.params[0] not in params:
            continue
        values = [params[name] for name in rule.params]
        for layer in range(model.config.n_layers) if "{l}" in rule.tensor else (...,):
            name = rule.tensor.replace("{l}", str(layer))
            tensors[name] = rule.joined([value[layer] for value in values], model.config)
    return tensors


def local_folder(
    path_or_repo_id: str | Path,
    *,
    revision: str | None = None,
    files: tuple[str, ...] = HUB_FILES,
) -> Path:
    """The folder itself, or the local snapshot of a hub id, downloaded if need be.

    Raises:
        CheckpointError: if there is neither.
    """
    if not isinstance(path_or_repo_id, str | Path) or not str(path_or_repo_id).strip():
        do = "give a folder or a hub id"
        raise TypeError(expected("path_or_repo_id", "a path or a name", repr(path_or_repo_id), do))
    folder, reason = Path(path_or_repo_id), "there is no such folder"
    if folder.is_dir():
        return folder
    if folder.is_file():
        reason = f"that is a file; give its folder, {str(folder.parent)!r}"
    if isinstance(path_or_repo_id, str) and not folder.exists():
        import huggingface_hub

        try:
            return Path(
                huggingface_hub.snapshot_download(
                    path_or_repo_id, revision=revision, allow_patterns=list(files)
                )
            )
        except (OSError, ValueError) as error:
            reason = f"{reason}, and the hub said: {str(error).strip().splitlines()[0]}"
    must = "a folder, or a hub id that can be reached"
    raise CheckpointError(expected("path_or_repo_id", must, repr(str(path_or_repo_id)), reason))


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a memory-mapped safetensors file; `stored` is the format's name of its dtype."""

    stored: str
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return STORED[self.stored]

    @property
    def array(self) -> np.ndarray:
        return self.data.view(self.dtype).reshape(self.shape)


def _hf_config(folder: Path) -> tuple[Family, ModelConfig]:
    hf = _json(folder / "config.json", "a Hugging Face folder, or one made by `save`")
    try:
        family = family_for(hf.get("model_type"))
        return family, family.config(hf)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used:\n{error}") from None


def _open(folder: Path) -> dict[str, _Tensor]:
    """Every tensor of a folder, by its name on disk."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _open_file(single)
    if not index.is_file():
        found = sorted(p.name for p in folder.iterdir())[:20]
        must = "a folder with model.safetensors or model.safetensors.index.json"
        do = "convert other formats with save_pretrained of transformers"
        raise CheckpointError(expected("path_or_repo_id", must, f"{folder} with {found}", do))
    weight_map = _json(index, "an index of safetensors files").get("weight_map")
    if not isinstance(weight_map, dict):
        do = "download it again"
        raise CheckpointError(expected("weight_map", "a table", repr(weight_map), do))
    problems, opened = [], {}
    for file in sorted(set(map(str, weight_map.values()))):
        if not _inside(file):
            do = f"correct {index.name}"
            problems.append(expected("weight_map", "of files inside the folder", repr(file), do))
        elif not (folder / file).is_file():
            do = "download it again"
            problems.append(expected("weight_map", "of files that exist", repr(file), do))
        else:
            try:
                opened[file] = _open_file(folder / file)
            except CheckpointError as error:
                problems.append(str(error))
    for name, file in weight_map.items():
        if file in opened and name not in opened[file]:
            got = f"a file {file!r} without it"
            problems.append(expected(name, "where the index says", got, "download it again"))
    if problems:
        raise CheckpointError("\n".join(problems))
    tensors = {name: t for file in opened.values() for name, t in file.items()}
    return tensors | {name: opened[file][name] for name, file in weight_map.items()}


def _inside(file: str) -> bool:
    """Whether a name in an index stays in the folder, on any system."""
    paths = PurePosixPath(file), PureWindowsPath(file)
    return not any(p.is_absolute() or p.drive or p.root or ".." in p.parts for p in paths)


def _open_file(file: Path) -> dict[str, _Tensor]:
    try:
        with safe_open(file, framework="numpy"):
            pass  # checks the header against the size of the file
    except (SafetensorError, OSError) as error:
        must, do = "a whole safetensors file", f"download it again ({error})"
        got = f"{file.stat().st_size} bytes that are not"
        raise CheckpointError(expected(file.name, must, got, do)) from None
    data = np.memmap(file, np.uint8, mode="r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        begin, end = (start + offset for offset in about["data_offsets"])
        tensors[name] = _Tensor(about["dtype"], tuple(about["shape"]), data[begin:end])
    return tensors


def _with_prefix(tensors: dict[str, _Tensor], family: Family) -> dict[str, _Tensor]:
    """The tensors under the names of the family's table; buffers are left out."""
    known = {re.sub(r"\\\{l\\\}", r"\\d+", re.escape(rule.tensor)) for rule in family.rules}
    pattern = re.compile("|".join(known))
    named = {}
    for name, tensor in tensors.items():
        if any(re.fullmatch(buffer, name) for buffer in family.buffers):
            continue
        full = family.prefix + name
        bare = not pattern.fullmatch(name) and pattern.fullmatch(full) and full not in tensors
        named[full if bare else name] = tensor
    return named


def _plan(
    family: Family, config: ModelConfig, tensors: Mapping[str, _Tensor]
) -> dict[str, tuple[Rule, list[str]]]:
    """The rule and the tensors of every parameter; raises unless they fit one to one."""
    params = dict(_parameters(config)[0])
    plan, used, problems = {}, set(), []
    for rule in family.rules:
        if rule.params[0] not in params:
            continue
        stacked = "{l}" in rule.tensor
        layers = range(config.n_layers if stacked else 1)
        names = [rule.tensor.replace("{l}", str(layer)) for layer in layers]
        used.update(names)
        plan |= {param: (rule, names) for param in rule.params}
        shape = rule.shape(config)
        for name in names:
            got = tensors.get(name)
            if got is None:
                must, do = f"in the checkpoint, with shape {shape}", "compare it with config.json"
                problems.append(expected(name, must, "no such tensor", do))
            elif got.shape != shape:
                do = "compare it with config.json"
                problems.append(expected(name, f"of shape {shape}", f"shape {got.shape}", do))
            elif got.stored not in STORED:
                must, do = f"stored as one of {tuple(STORED)}", "convert the weights"
                problems.append(expected(name, must, got.stored, do))
    used |= _redundant(family, params, tensors)
    for name in tensors.keys() - used:
        got = f"a tensor of shape {tensors[name].shape}"
        must = f"a weight of this {family.name} config"
        problems.append(expected(name, must, got, "the model has no place for it"))
    unfilled = params.keys() - plan.keys()
    assert not unfilled, f"no rule of {family.name} fills {sorted(unfilled)}"
    if problems:
        raise CheckpointError("\n".join(sorted(problems, key=_natural)))
    return plan


def _redundant(family: Family, params: Mapping, tensors: Mapping[str, _Tensor]) -> set[str]:
    """The unembedding of a tied model, if it is stored and equals the embedding."""
    head = next(rule.tensor for rule in family.rules if rule.params == ("w_u",))
    table = next(rule.tensor for rule in family.rules if rule.params == ("w_e",))
    if "w_u" in params or head not in tensors or table not in tensors:
        return set()
    a, b = tensors[head], tensors[table]
    step = 1 << 24
    same = (a.stored, a.shape) == (b.stored, b.shape) and all(
        np.array_equal(a.data[i : i + step], b.data[i : i + step])
        for i in range(0, a.data.size, step)
    )
    return {head} if same else set()


def _natural(text: str) -> list:
    """A sorting key that counts layers as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _restore(
    folder: Path, dtype: str | None, mesh: Mesh | None, compute: dict[str, Any]
) -> Transformer:
    import orbax.checkpoint as ocp

    file = folder / NATIVE_CONFIG
    about = _json(file, "a checkpoint made by `save`")
    if about.get("format") != FORMAT:
        do = "read it with the version of arrakis_jax that wrote it, or convert it again"
        raise CheckpointError(expected("format", str(FORMAT), repr(about.get("format")), do))
    try:
        fields = dict(about["config"])
        if fields.get("rope_scaling"):
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        config = ModelConfig(**fields)
    except (KeyError, TypeError, ValueError) as error:
        do = f"save it again with this version ({error})"
        raise CheckpointError(expected(file.name, "a ModelConfig", "another one", do)) from None
    config = replace(config, dtype=_checked_dtype(dtype or config.dtype), **compute)
    params = dict(_parameters(config)[0])
    wanted = {name: leaf.shape for name, leaf in params.items()}
    target = {name: _target(name, leaf, mesh) for name, leaf in params.items()}
    place = folder.absolute() / NATIVE_WEIGHTS
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # Orbax itself does not compare the shapes of what it restores to host memory.
            about = checkpointer.metadata(place).item_metadata
            if about is None:
                raise ValueError("its metadata cannot be read")
            stored = {name: tuple(array.shape) for name, array in dict(about).items()}
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
    return _assembled(config, mesh, lambda name, _, to: jax.device_put(weights[name], to))


def _target(name: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh | None) -> Any:
    """What Orbax restores a parameter to: host memory, or its place on the mesh."""
    if mesh is None:
        return np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(name, leaf, mesh))


def _json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object, or a CheckpointError."""
    if not file.is_file():
        got = f"{file.parent} without {file.name}"
        do = "give the folder that holds the weights"
        raise CheckpointError(expected("path_or_repo_id", what, got, do))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        do = f"download it again ({error})"
        raise CheckpointError(expected(file.name, "JSON", "other text", do)) from None
    if not isinstance(content, dict):
        do = "download it again"
        raise CheckpointError(expected(file.name, "a JSON object", type(content).__name__, do))
    return content


def _parameters(config: ModelConfig) -> tuple[list[tuple[str, jax.ShapeDtypeStruct]], Any]:
    """The name and shape of every parameter, in the order of the tree, and the tree."""
    abstract = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    return [(_name(path), leaf) for path, leaf in leaves], tree


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _assembled(
    config: ModelConfig,
    mesh: Mesh | None,
    make: Callable[[str, tuple[int, ...], Sharding | None], Array],
) -> Transformer:
    """A model whose parameters are `make(name, shape, sharding)`."""
    params, tree = _parameters(config)
    arrays = [make(name, leaf.shape, _sharding(name, leaf, mesh)) for name, leaf in params]
    return jax.tree_util.tree_unflatten(tree, arrays)


def _sharding(name: str, leaf: jax.ShapeDtypeStruct, mesh: Mesh | None) -> Sharding | None:
    return None if mesh is None else NamedSharding(mesh, partition(name, leaf.shape, mesh))


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is divided over the mesh axis "model"; whole if it does not divide."""
    axes = SHARDED.get(name.split(".")[-1], ())
    axes = (None,) * (len(shape) - len(axes)) + axes
    return PartitionSpec(
        *(
            axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that JAX can use on a CPU without a copy."""
    size = prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _widest(dtypes: set[np.dtype]) -> str:
    if dtypes == {STORED["BF16"]}:
        return "bfloat16"
    return np.result_type(np.float32, *dtypes).name


def _auto(mesh: Any) -> Mesh | None:
    """The mesh with Auto axes: Explicit ones, JAX's default, are not for plain model code."""
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        do = "make one with jax.make_mesh"
        raise TypeError(expected("mesh", "a jax.sharding.Mesh or None", type(mesh).__name__, do))
    return Mesh(mesh.devices, mesh.axis_names)


def _checked_dtype(dtype: Any) -> str:
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in ("float32", "bfloat16", "float64"):
        must, do = "'float32', 'bfloat16' or 'float64'", "choose one of them"
        raise ValueError(expected("dtype", must, repr(dtype), do))
    if name == "float64" and jnp.result_type(float) != np.float64:
        must, do = "'float32' or 'bfloat16' without x64", "enable jax_enable_x64, or choose one"
        raise ValueError(expected("dtype", must, "'float64'", do))
    return name
