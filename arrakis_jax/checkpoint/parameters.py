"""The parameters of a config: their names, shapes, layers, and places on a mesh."""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from arrakis_jax.core.axes import Array
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.transformer import Transformer

_BLOCK = re.compile(r"blocks\.|segments\.(\d+)\.")

# For each axis of a parameter, without the layer axis: the mesh axis that divides it. A parameter
# that is not named here, or has another number of axes, is whole on every device.
SHARDED = {
    "w_e": ("model", None),
    "w_u": (None, "model"),
    "b_u": ("model",),
    "attn.w_q": (None, "model", None),
    "attn.w_k": (None, "model", None),
    "attn.w_v": (None, "model", None),
    "attn.w_o": ("model", None, None),
    "attn.b_q": ("model", None),
    "attn.b_k": ("model", None),
    "attn.b_v": ("model", None),
    "attn.sinks": ("model",),
    "attn.norm_q.w": ("model", None),
    "attn.norm_q.b": ("model", None),
    "attn.norm_k.w": ("model", None),
    "attn.norm_k.b": ("model", None),
    "mlp.w_in": (None, "model"),
    "mlp.w_gate": (None, "model"),
    "mlp.w_out": ("model", None),
    "mlp.b_in": ("model",),
    "mlp.b_gate": ("model",),
    "moe.w_in": ("model", None, None),
    "moe.w_gate": ("model", None, None),
    "moe.w_out": ("model", None, None),
    "moe.b_in": ("model", None),
    "moe.b_gate": ("model", None),
    "moe.b_out": ("model", None),
    "moe.shared.w_in": (None, "model"),
    "moe.shared.w_gate": (None, "model"),
    "moe.shared.w_out": ("model", None),
    "moe.shared.b_in": ("model",),
    "moe.shared.b_gate": ("model",),
}


@lru_cache(maxsize=8)
def parameters(config: ModelConfig) -> tuple[dict[str, jax.ShapeDtypeStruct], Any]:
    """The shape of every parameter by its name, in the tree's order; and the tree's structure."""
    abstract = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return named(abstract), jax.tree.structure(abstract)


def named(model: Transformer) -> dict[str, Any]:
    """The parameters of a model by name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in leaves
    }


def layers_of(name: str, config: ModelConfig) -> tuple[str, range]:
    """A parameter's name as in the rules of families (without its segment), and its layers."""
    block = _BLOCK.match(name)
    if block is None:
        return name, range(0)
    counts = [n for _, n in config.segments]
    i = int(block[1] or 0)
    start = sum(counts[:i])
    return f"blocks.{name[block.end() :]}", range(start, start + counts[i])


def assembled_model(
    config: ModelConfig,
    mesh: Mesh | None,
    make: Callable[[str, tuple[int, ...], Sharding | None], Array],
) -> Transformer:
    """A model whose parameters are `make(name, shape, sharding)`."""
    params, tree = parameters(config)
    # Each parameter is waited for: while accelerators copy, the host would hold several at once.
    arrays = [
        jax.block_until_ready(make(name, leaf.shape, sharding(name, leaf.shape, mesh)))
        for name, leaf in params.items()
    ]
    return jax.tree.unflatten(tree, arrays)


def sharding(name: str, shape: tuple[int, ...], mesh: Mesh | None) -> Sharding | None:
    """Where a parameter belongs on a mesh; None without one."""
    return None if mesh is None else NamedSharding(mesh, partition(name, shape, mesh))


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """How a parameter is divided over the mesh axis "model"; whole if it does not divide."""
    key = _BLOCK.sub("", name, count=1)
    stacked = (None,) * (key != name)
    axes = (*stacked, *SHARDED.get(key, ()))
    if len(axes) != len(shape):
        return PartitionSpec()
    return PartitionSpec(
        *(
            axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape, strict=True)
        )
    )
