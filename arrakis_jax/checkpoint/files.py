"""The files of a checkpoint, on disk or on the hub, and their tensors, which are not read yet."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from arrakis_jax.core.errors import CheckpointError, expected

NATIVE_CONFIG = "arrakis_jax.json"
NATIVE_WEIGHTS = "weights"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", f"{NATIVE_WEIGHTS}/*")
# Downloaded only where a hub id has none of the above.
TORCH_FILES = ("pytorch_model*.bin",)
# The same weights once more, under their makers' names.
NOT_FILES = ("original/*", "consolidated*")

# Dtypes by their names in safetensors. Weights are in one of the first four; U8 holds MXFP4.
STORED = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
}
WEIGHTS = ("F64", "F32", "F16", "BF16")
TORCH = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
        name: its name on disk.
        stored: its dtype's name in safetensors.
        shape: its shape.
        read: returns its numbers, memory-mapped if the file holds them as they are.
        parts: the slices along its first axis, if it is computed when read; each is computed alone.
    """

    name: str
    stored: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    parts: "tuple[Tensor, ...]" = ()

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its numbers, if it is one of `STORED`."""
        return STORED[self.stored]


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
                    path_or_repo_id,
                    revision=revision,
                    allow_patterns=list(files),
                    ignore_patterns=list(NOT_FILES),
                )
            )
        except (OSError, ValueError) as error:
            reason = f"{reason}, and the hub said: {str(error).strip().splitlines()[0]}"
    must = "a folder, or a hub id that can be reached"
    raise CheckpointError(expected("path_or_repo_id", must, repr(str(path_or_repo_id)), reason))


def weights_folder(path_or_repo_id: str | Path, revision: str | None) -> Path:
    """The local folder of a checkpoint; for a hub id without safetensors, with torch's files."""
    folder = local_folder(path_or_repo_id, revision=revision)
    if (folder / NATIVE_CONFIG).is_file() or any(folder.glob("*.safetensors")):
        return folder
    return local_folder(path_or_repo_id, revision=revision, files=TORCH_FILES)


def read_json(file: Path, must: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: if there is none; `must` says what its folder should be.
    """
    if not file.is_file():
        got = f"{file.parent} without {file.name}"
        do = "give the folder that holds the weights"
        raise CheckpointError(expected("path_or_repo_id", must, got, do))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        do = f"download it again ({error})"
        raise CheckpointError(expected(file.name, "JSON", "other text", do)) from None
    if not isinstance(content, dict):
        do = "download it again"
        raise CheckpointError(expected(file.name, "a JSON object", type(content).__name__, do))
    return content


def open_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by its name. torch's files count if there is no safetensors file.

    Raises:
        CheckpointError: listing every file that is missing, broken, or outside of the folder.
    """
    for name, opened in (("model.safetensors", _safetensors), ("pytorch_model.bin", _torch)):
        if (folder / name).is_file():
            return opened(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _sharded(folder / f"{name}.index.json", opened)
    names = sorted(p.name for p in folder.iterdir())[:20]
    must = "a folder with model.safetensors or pytorch_model.bin, or one's .index.json"
    do = "convert other formats with save_pretrained of transformers"
    raise CheckpointError(expected("path_or_repo_id", must, f"{folder} with {names}", do))


def _sharded(index: Path, open_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    weight_map = read_json(index, "an index of files").get("weight_map")
    if not isinstance(weight_map, dict):
        do = "download it again"
        raise CheckpointError(expected("weight_map", "a table", repr(weight_map), do))
    problems, opened = [], {}
    strange = [name for name, file in weight_map.items() if not isinstance(file, str)]
    if strange:
        got, do = repr(weight_map[strange[0]]), f"correct {index.name}"
        raise CheckpointError(expected(f"weight_map[{strange[0]!r}]", "a file's name", got, do))
    for file in sorted(set(weight_map.values())):
        if not _inside(file):
            do = f"correct {index.name}"
            problems.append(expected("weight_map", "of files inside the folder", repr(file), do))
        elif not (index.parent / file).is_file():
            do = "download it again"
            problems.append(expected("weight_map", "of files that exist", repr(file), do))
        else:
            try:
                opened[file] = open_file(index.parent / file)
            except CheckpointError as error:
                problems.append(str(error))
    for name, file in weight_map.items():
        if file in opened and name not in opened[file]:
            got = f"a file {file!r} without it"
            problems.append(expected(name, "where the index says", got, "download it again"))
    if problems:
        raise CheckpointError("\n".join(problems))
    # A tensor that the index does not name is kept, so that it is reported as left over.
    tensors = {name: t for file in opened.values() for name, t in file.items()}
    return tensors | {name: opened[file][name] for name, file in weight_map.items()}


def _inside(file: str) -> bool:
    """Whether a name in an index stays in the folder, on any system."""
    paths = PurePosixPath(file), PureWindowsPath(file)
    return not any(p.is_absolute() or p.drive or p.root or ".." in p.parts for p in paths)


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        # Opening it checks the header, its shapes and dtypes, against the size of the file.
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        must, do = "a whole safetensors file", f"download it again ({error})"
        got = f"{file.stat().st_size} bytes that are not"
        raise CheckpointError(expected(file.name, must, got, do)) from None
    # Mapped by hand, because safetensors would copy what it reads. The file begins with the size of
    # the header in 8 bytes, and offsets count from the header's end.
    data = np.memmap(file, np.uint8, mode="r")
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)

    def read(dtype: str, shape: list[int], begin: int, end: int) -> np.ndarray:
        return data[start + begin : start + end].view(STORED[dtype]).reshape(shape)

    tensors = {}
    for name, entry in header.items():
        dtype, shape = entry["dtype"], entry["shape"]
        reader = partial(read, dtype, shape, *entry["data_offsets"])
        tensors[name] = Tensor(name, dtype, tuple(shape), reader)
    return tensors


def _torch(file: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        must, do = "in safetensors where torch is not installed", "install torch, or convert it"
        raise CheckpointError(expected(file.name, must, "a file of torch", do)) from None
    try:
        # Before torch 1.6 files were not zip files, and cannot be memory-mapped.
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken pickle can raise anything
        must = "a whole file of torch that holds weights and nothing else"
        do = f"download it again ({type(error).__name__})"
        got = f"{file.stat().st_size} bytes that are not"
        raise CheckpointError(expected(file.name, must, got, do)) from None
    values = state.items() if isinstance(state, dict) else [(file.name, state)]
    wrong = [
        (k, v)
        for k, v in values
        if not (isinstance(k, str) and isinstance(v, torch.Tensor)) or v.is_sparse or v.is_meta
    ]
    if wrong:
        must = "a tensor with numbers, under a name"
        problems = (expected(str(k), must, type(v).__name__, "remove it") for k, v in wrong)
        raise CheckpointError("\n".join(problems))

    def read(tensor: torch.Tensor) -> np.ndarray:
        if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16: the same bits, as integers
            return tensor.view(torch.int16).numpy().view(STORED["BF16"])
        return tensor.numpy()

    tensors = {}
    for name, value in values:
        kind = str(value.dtype).removeprefix("torch.")
        stored = TORCH.get(kind, kind)
        tensors[name] = Tensor(name, stored, tuple(value.shape), partial(read, value.detach()))
    return tensors
