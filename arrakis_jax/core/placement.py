"""Arrays on meshes: the library computes with Auto axes, where XLA divides the work by itself."""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding

from arrakis_jax.core.axes import Array
from arrakis_jax.core.errors import expected


def auto_mesh(mesh: Any) -> Mesh:
    """The mesh with Auto axes. Explicit axes, JAX's default, would break plain model code."""
    if not isinstance(mesh, Mesh):
        do = "make one with jax.make_mesh"
        raise TypeError(expected("mesh", "a jax.sharding.Mesh", type(mesh).__name__, do))
    return Mesh(mesh.devices, mesh.axis_names)


def auto_placed(array: Array) -> Array:
    """The array where it is, on the same mesh with Auto axes. No data moves.

    Raises ValueError inside of `jax.set_mesh` of a mesh with Explicit axes, where it would fail.
    """
    if isinstance(array, Tracer):
        return array
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return array
    if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
        do = "leave its block, or make it with axis_types=(jax.sharding.AxisType.Auto,) * n"
        must = "without Explicit axes where arrays are on a mesh"
        raise ValueError(expected("jax.set_mesh", must, f"{sharding.mesh.axis_names}", do))
    if all(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return array
    return jax.device_put(array, NamedSharding(auto_mesh(sharding.mesh), sharding.spec))


def rows_over(arrays: Any, mesh: Mesh, axis: str) -> Any:
    """Arrays with their first axis divided over one axis of a mesh, the others whole."""
    mesh = auto_mesh(mesh)
    if axis not in mesh.shape:
        must, do = f"an axis of the mesh, {mesh.axis_names}", "name the axis of batches"
        raise ValueError(expected("axis", must, repr(axis), do))
    rows = jax.tree.leaves(arrays)[0].shape[0]
    if rows % mesh.shape[axis]:
        short = -rows % mesh.shape[axis]
        do = f"add {short} prompts, repeats for example, and drop their results"
        must = f"a multiple of the {mesh.shape[axis]} devices along {axis!r}"
        raise ValueError(expected("prompts", must, f"{rows} of them", do))
    return jax.device_put(arrays, NamedSharding(mesh, jax.sharding.PartitionSpec(axis)))
