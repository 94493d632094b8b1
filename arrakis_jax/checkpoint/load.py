"""`from_pretrained`: a model from a folder or a hub id.

Tensors are memory-mapped and copied once, into one array for each stacked parameter, or for each
device's share of it. On a CPU JAX uses that array as it is, so loading takes no more memory than
the model. torch is imported only for weights in torch's own format.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from arrakis_jax.checkpoint.files import (
    NATIVE_CONFIG,
    STORED,
    Tensor,
    open_folder,
    read_json,
    weights_folder,
)
from arrakis_jax.checkpoint.mxfp4 import unpacked
from arrakis_jax.checkpoint.native import native_config, restore
from arrakis_jax.checkpoint.parameters import assembled_model, parameters
from arrakis_jax.checkpoint.weights import ParameterSource, finite, sources
from arrakis_jax.core.axes import Array
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import CheckpointError, expected
from arrakis_jax.core.placement import auto_mesh
from arrakis_jax.families import family_for
from arrakis_jax.families.base import Family
from arrakis_jax.nn.transformer import Transformer

# Fields that a nested decoder config takes from the config around it, unless it has them itself.
INHERITED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
LARGE = 1_000_000_000  # a progress bar is shown for as many bytes of weights


def from_pretrained(
    path_or_repo_id: str | Path,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    revision: str | None = None,
    stream_dtype: Literal["bfloat16"] | None = None,
    matmul_precision: Literal["highest", "high", "default"] | None = None,
) -> Transformer:
    """A model from a Hugging Face checkpoint, or from one made by `save`.

    Args:
        path_or_repo_id: a local folder, or a hub id (HF_HUB_OFFLINE is honoured). Weights are read
            from safetensors; if there are none, from torch's .bin files, which needs torch.
        dtype: "float32", "bfloat16", or "float64" under x64. None takes the widest dtype of the
            stored weights, where float16 becomes float32, and MXFP4 bfloat16.
        mesh: where to put the parameters. Heads, MLP units, experts and vocabulary are divided over
            its axis "model", if it has one and their number divides; everything else is on every
            device. Explicit axes are used as Auto.
        revision: branch, tag or commit of a hub id.
        stream_dtype: "bfloat16" rounds the residual stream to it (see ModelConfig).
        matmul_precision: the precision of float32 products. None takes "highest", or the one in a
            checkpoint made by `save`. "high" and "default" are faster on TPUs and GPUs.

    Returns:
        The model. Its weights are neither folded nor centred.

    Raises:
        CheckpointError: listing every tensor that is missing, left over or of another shape, and
            every config field that is not supported.
        ValueError: for another dtype.
        TypeError: for a `path_or_repo_id` that is no path, or a `mesh` that is no mesh.

    Warns:
        UserWarning: for weights that are infinite or not a number.
    """
    dtype = None if dtype is None else _checked_dtype(dtype)
    mesh = None if mesh is None else auto_mesh(mesh)
    folder = weights_folder(path_or_repo_id, revision)
    chosen = {"stream_dtype": stream_dtype, "matmul_precision": matmul_precision}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if (folder / NATIVE_CONFIG).is_file():
        config = native_config(folder)
        dtype = _checked_dtype(dtype or config.dtype)
        return restore(folder, replace(config, dtype=dtype, **chosen), mesh)
    family, config = _hf_config(folder)
    by_parameter = sources(family, config, unpacked(open_folder(folder)))
    dtype = dtype or _checked_dtype(_widest(by_parameter))
    return _filled(by_parameter, replace(config, dtype=dtype, **chosen), mesh)


def _hf_config(folder: Path) -> tuple[Family, ModelConfig]:
    file = folder / "config.json"
    hf = read_json(file, "a Hugging Face folder, or one made by `save`")
    try:
        family = family_for(hf.get("model_type"))
        if family.nested is not None and family.nested in hf:
            inner = hf[family.nested]
            if not isinstance(inner, dict):
                do = "download it again"
                raise ValueError(expected(family.nested, "a table", type(inner).__name__, do))
            hf = {name: hf[name] for name in INHERITED if name in hf} | inner
        return family, family.config(hf)
    except ValueError as error:
        raise CheckpointError(f"{file} cannot be used:\n{error}") from None


def _filled(
    by_parameter: dict[str, ParameterSource], config: ModelConfig, mesh: Mesh | None
) -> Transformer:
    """The model with the numbers of these tensors."""
    wrong: dict[str, None] = {}
    total = sum(prod(leaf.shape) for leaf in parameters(config)[0].values())

    with _progress(total * np.dtype(config.dtype).itemsize) as advance:

        def done(tensor: Tensor, piece: np.ndarray) -> None:
            if not finite(piece):
                wrong[tensor.name] = None
            advance(piece.nbytes)

        def make(name: str, shape: tuple[int, ...], sharding: Sharding | None) -> Array:
            parts: dict[tuple, np.ndarray] = {}

            # Devices may hold the same part of a parameter: it is read once.
            def part(index: tuple[slice, ...] | None = None) -> np.ndarray:
                index = (slice(None),) * len(shape) if index is None else index
                key = tuple(i.indices(n) for i, n in zip(index, shape, strict=True))
                if key not in parts:
                    parts[key] = by_parameter[name].read(shape, index, config, done)
                return parts[key]

            if sharding is None:
                return jax.device_put(part())
            return jax.make_array_from_callback(shape, sharding, part)

        model = assembled_model(config, mesh, make)
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        got = f"NaN or infinity in {', '.join(list(wrong)[:10])}{more}"
        do = "results will be NaN where they reach"
        warnings.warn(expected("weights", f"finite in {config.dtype}", got, do), stacklevel=3)
    return model


@contextmanager
def _progress(size: int) -> Iterator[Callable[[int], None]]:
    """A bar in the terminal, for large models; yields a function to call with the bytes done."""
    if size < LARGE:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("loading", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    off = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=off) as progress:
        yield partial(progress.advance, progress.add_task("loading", total=size))


def _widest(by_parameter: dict[str, ParameterSource]) -> str:
    dtypes = {tensor.dtype for source in by_parameter.values() for tensor in source.tensors.flat}
    if dtypes == {STORED["BF16"]}:
        return "bfloat16"
    return np.result_type(np.float32, *dtypes).name


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
