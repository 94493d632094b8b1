"""Edits: what a forward does to its own activations, as data.

An edit is a pytree (arrays and indices are leaves, so that vmap sweeps over them without
recompiling) and a function `(site, layer, value) -> value`. A forward calls every edit at every
site, in order. Any other callable of that form is an edit too.
"""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.axes import Array, Int
from arrakis_jax.checks import host
from arrakis_jax.errors import expected
from arrakis_jax.residuals import FIELDS, UNSTACKED

EDIT_SITES = (*FIELDS, "resid_post")

# Axes of a site's value counted from the right: (position axis, head axis).
_AXES = {
    "q": (-3, -2), "k": (-3, -2), "v": (-3, -2), "z": (-3, -2), "pattern": (-2, -3),
    "norm_attn_scale": (-1, None), "norm_mlp_scale": (-1, None), "norm_final_scale": (-1, None),
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """A change of the value at one site.

    Attributes:
        site: the name of a ResidualStream field, or "resid_post".
        value: what the change needs; it broadcasts to what is selected: the site's value
            without the head axis if `head` is given and without the position axis if `position`
            is given (or to the site's whole value).
        layer: the layer to change, or None for every layer; an int in [-L, L) or a traced scalar.
        head: the head to change (key/value head at "k" and "v"), or None for every head.
        position: the position to change, counted in real tokens (-1 is each row's last), or None
            for every position. A row that has no such token is left as it is.
    """

    site: str = field(metadata={"static": True})
    value: Any = None
    layer: Any = field(default=None, kw_only=True)
    head: Any = field(default=None, kw_only=True)
    position: Any = field(default=None, kw_only=True)

    def bind(self, n_layers: int, position_BT: Int[Array, "B T"], count_B: Int[Array, " B"]) -> Any:
        """The edit with its layer counted from 0 and its position as a `[B,T]` selection."""
        layer, position = self.layer, self.position
        if layer is not None:
            layer = jnp.where(jnp.asarray(layer) < 0, layer + n_layers, layer)
        if position is not None:
            wanted_B = jnp.where(jnp.asarray(position) < 0, position + count_B, position)
            position = position_BT == wanted_B[:, None]
        return replace(self, layer=layer, position=position)

    def __call__(self, site: str, layer: Int[Array, ""] | None, value: Array) -> Array:
        """The value with the change made where this edit selects it."""
        if site != self.site:
            return value
        at_position, at_head = _AXES.get(site, (-2, None))
        removed = [at_position % value.ndim] if self.position is not None else []
        select = jnp.ones((1,) * value.ndim, bool)
        if self.layer is not None and layer is not None:
            select &= layer == self.layer
        if self.head is not None:
            removed.append(at_head % value.ndim)
            select &= _along(jnp.arange(value.shape[at_head]), at_head, value.ndim) == self.head
        if self.position is not None:
            select &= jnp.expand_dims(
                self.position, [a for a in range(1, value.ndim) if a != removed[0]]
            )
        try:
            changed = jnp.broadcast_to(self.change(value, layer, sorted(removed)), value.shape)
        except (ValueError, TypeError) as error:
            must = f"broadcastable to site {site!r} of shape {value.shape}"
            do = "leave out the axes that `head` and `position` select"
            got = f"shape {jnp.shape(self.value)}"
            raise ValueError(expected("value", must, got, do)) from error
        return jnp.where(select, changed, value)

    @abstractmethod
    def change(self, value: Array, layer: Int[Array, ""] | None, removed: list[int]) -> Array:
        """The changed value, before it is restricted to the selection."""

    def operand(self, value: Array, removed: list[int]) -> Array:
        """`self.value`, shaped to broadcast against the site's value."""
        operand = jnp.asarray(self.value).astype(value.dtype)
        missing = value.ndim - len(removed) - operand.ndim
        if missing < 0:  # it has the site's own rank
            return operand
        return jnp.expand_dims(operand.reshape((1,) * missing + operand.shape), removed)


def _along(index: Array, axis: int, ndim: int) -> Array:
    return index.reshape([-1 if a == axis % ndim else 1 for a in range(ndim)])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Set(Edit):
    """Sets the selected value: `Set("z", 0.0, layer=3, head=1)` zero-ablates a head."""

    def change(self, value, layer, removed):  # noqa: D102
        return self.operand(value, removed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Add(Edit):
    """Adds to the selected value: `Add("resid_post", 4.0 * direction, layer=6)` steers."""

    def change(self, value, layer, removed):  # noqa: D102
        return value + self.operand(value, removed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scale(Edit):
    """Multiplies the selected value."""

    def change(self, value, layer, removed):  # noqa: D102
        return value * self.operand(value, removed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Project(Edit):
    """Projects the selected value off one direction `[D]` or the span of several `[N,D]`.

    What is left is orthogonal to every direction. The directions need be neither orthogonal nor
    of unit length, but must be linearly independent.
    """

    def change(self, value, layer, removed):  # noqa: D102
        directions_ND = jnp.atleast_2d(jnp.asarray(self.value)).astype(value.dtype)
        basis_DN = jnp.linalg.qr(directions_ND.T)[0]
        inside = jnp.einsum("...D,DN->...N", value, basis_DN, precision="highest")
        return value - jnp.einsum("...N,DN->...D", inside, basis_DN, precision="highest")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Replace(Edit):
    """Puts the activations of another run in place: activation patching.

    `value` is the captured field of that run: `[L,B,T,...]`, or `[B,T,...]` for `embed` and
    `final` or for one layer.
    """

    def change(self, value, layer, removed):  # noqa: D102
        other = jnp.asarray(self.value).astype(value.dtype)
        if self.site not in UNSTACKED and other.ndim == value.ndim + 1:
            other = jax.lax.dynamic_index_in_dim(other, layer, keepdims=False)
        return other


def check_edits(edits: tuple, n_layers: int, n_heads: int, n_kv_heads: int) -> None:
    """Raises for an unknown site and for a layer or head that is known and out of range."""
    for edit in edits:
        if not isinstance(edit, Edit):
            if not callable(edit):
                do = "pass a tuple of Set, Add, Scale, Project, Replace or functions"
                raise TypeError(expected("edits", "made of edits", repr(edit), do))
            continue
        if edit.site not in EDIT_SITES:
            raise ValueError(
                expected("site", f"one of {EDIT_SITES}", repr(edit.site), "name one of them")
            )
        heads = n_kv_heads if edit.site in ("k", "v") else n_heads
        has_heads = edit.site in ("q", "k", "v", "z", "pattern")
        for name, size in (("layer", n_layers), ("head", heads)):
            given = getattr(edit, name)
            if given is None:
                continue
            if name == "head" and not has_heads:
                do = "use site 'z' for a head's output"
                raise ValueError(expected("head", f"None at site {edit.site!r}", given, do))
            low = -size if name == "layer" else 0
            values = host(given)
            if values is not None and not ((low <= values) & (values < size)).all():
                do = f"the model has {size} of them"
                raise IndexError(expected(name, f"in [{low}, {size})", given, do))
