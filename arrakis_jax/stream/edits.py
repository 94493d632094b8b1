"""Edits: changes that a forward makes to its own activations, as data.

An edit is a pytree (arrays and indices are leaves, so that vmap sweeps over them without
recompiling) and a function `(site, layer, value) -> value`. A forward calls every edit at every
site, in order (nn/site.py). Any other callable of that form is an edit too.
"""

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.core.checks import host
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.stream.fields import FIELDS, READERS, SCALES, SEGMENTED, UNSTACKED, lacking

EDIT_SITES = (*(name for name in FIELDS if name != "routing"), "resid_post", *READERS)
HEAD_SITES = ("q", "k", "v", "z", "pattern", "q_in", "k_in", "v_in")
KV_SITES = ("k", "v", "k_in", "v_in")


def _axes(site: str) -> tuple[int, int]:
    """The position axis and (at a site that has one) the head axis of a site's value."""
    return (2, 1) if site == "pattern" else (1, 2)


def _rank(site: str, config: ModelConfig) -> int:
    """How many axes a site's value has, without L."""
    if site in SCALES:
        by_head = site in ("norm_q_scale", "norm_k_scale") and config.qk_norm != "all_heads"
        return 3 if by_head else 2
    return 4 if site in HEAD_SITES or (site == "mlp_act" and config.n_experts) else 3


@dataclass(frozen=True)
class Edit:
    """A change of the value at one site; a forward makes several edits in the order given.

    Only real tokens are changed. Values and indices may be traced, so that `vmap` sweeps over them.
    A traced layer or head that the model does not have selects nothing.

    Attributes:
        site: the name of a ResidualStream field, or "resid_post"; or a reader's input: "q_in"
            `[B,T,H,D]`, "k_in" and "v_in" `[B,T,G,D]` and "mlp_in" `[B,T,D]` are the stream as one
            head or the MLP reads it, before its norm. `q`, `k`, `v`, `z`, `pattern` and the inputs
            of heads have a head axis.
        value: the operand of the change. It broadcasts to the selected part: the site's value,
            without the head axis if `head` is given and without the position axis if `position`
            is given. It may also broadcast to the site's whole value. At mlp_act, shared_act and
            router, in a model of several segments: a tuple with one value for each segment, None
            where nothing is changed.
        layer: the layer to change, or None for every layer; an int in [-L, L) or a traced scalar.
        head: the head to change (key/value head at "k", "v", "k_in" and "v_in"), or None for every
            head.
        position: the position to change, counted in real tokens (-1 is each row's last): an int,
            or one for each row `[B]`, or None for every position. A row that has no such position
            stays as it is.
    """

    site: str = field(metadata={"static": True})
    value: Any = None
    layer: Any = field(default=None, kw_only=True)
    head: Any = field(default=None, kw_only=True)
    position: Any = field(default=None, kw_only=True)

    def bind(
        self, config: ModelConfig, position_BT: Int[Array, "B T"], count_B: Int[Array, " B"]
    ) -> Any:
        """The edit with its layer counted from 0 and its position as a `[B,T]` selection."""
        layer, position = self.layer, self.position
        if layer is not None:
            layer = jnp.asarray(layer)
            layer = jnp.where(layer < 0, layer + config.n_layers, layer)
        if position is not None:
            position = jnp.asarray(position)
            wanted_B = jnp.where(position < 0, position + count_B, position)
            position = position_BT == wanted_B[:, None]
        return replace(self, layer=layer, position=position)

    def of_segment(self, i: int, layers: range, n_layers: int) -> "Edit | None":
        """The edit in segment `i`, which has these layers; None if it has no value there."""
        if self.site not in SEGMENTED or not isinstance(self.value, tuple):
            return self
        value = self.value[i]
        return None if value is None else replace(self, value=value)

    def __call__(self, site: str, layer: Int[Array, ""] | None, value: Array) -> Array:
        """The site's value, changed where this edit selects it."""
        if site != self.site:
            return value
        at_position, at_head = _axes(site)
        # The axes that the operand may leave out, since the edit selects one index of them.
        removed = [at_position] if self.position is not None else []
        # Layer, head and position may be traced, so all is changed, and a mask selects.
        select = jnp.ones((1,) * value.ndim, bool)
        if self.layer is not None and layer is not None:
            select &= layer == self.layer
        if self.head is not None:
            removed.append(at_head)
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
            if site in SEGMENTED:
                do += ", and where layers differ give a tuple, a value (or None) for each segment"
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
        if missing < 0:  # it has the rank of the site's whole value
            return operand
        return jnp.expand_dims(operand.reshape((1,) * missing + operand.shape), removed)


def _along(index: Array, axis: int, ndim: int) -> Array:
    return index.reshape([-1 if a == axis else 1 for a in range(ndim)])


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

    The result is orthogonal to every direction. The directions need be neither orthogonal, nor of
    unit length, nor linearly independent.
    """

    def change(self, value, layer, removed):  # noqa: D102
        acc = jnp.promote_types(value.dtype, jnp.float32)
        directions_ND = jnp.atleast_2d(jnp.asarray(self.value)).astype(acc)
        # An SVD, and not QR: directions that depend on others add singular values of rounding size,
        # which are dropped.
        basis_DN, size_N, _ = jnp.linalg.svd(directions_ND.T, full_matrices=False)
        rounding = max(directions_ND.shape) * jnp.finfo(acc).eps * size_N[0]
        basis_DN = jnp.where((size_N > rounding)[None], basis_DN, 0)
        inside = jnp.einsum("...D,DN->...N", value.astype(acc), basis_DN, precision="highest")
        span = jnp.einsum("...N,DN->...D", inside, basis_DN, precision="highest")
        return (value.astype(acc) - span).astype(value.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Replace(Edit):
    """Puts the activations of another run in place: activation patching.

    `value` is the captured field of that run at all layers, `[L,B,T,...]`: each layer takes its own
    entry. Or it is as for `Set`: `[B,T,...]` for `embed` and `final`, or for one layer. A value
    whose first axis could be either, such as `[4,4,D]` at a position of 4 layers, rows and columns,
    is refused.
    """

    def bind(self, config, position_BT, count_B):  # noqa: D102
        if isinstance(self.value, tuple) and self.site in SEGMENTED:
            return super().bind(config, position_BT, count_B)
        value: Any = self.value
        shape, n = jnp.shape(value), config.n_layers
        stacked = self.site not in UNSTACKED and len(shape) == _rank(self.site, config) + 1
        if stacked and shape[0] != n:
            must, do = f"of all {n} layers, or of one", "give value[i] with layer=..."
            raise ValueError(expected("value", must, f"shape {shape}", do))
        self._check_first_axis(shape, config, position_BT.shape)
        return super().bind(config, position_BT, count_B)

    def _check_first_axis(
        self, shape: tuple[int, ...], config: ModelConfig, rows: tuple[int, ...]
    ) -> None:
        """Raises ValueError if the part selected in every layer could also be one layer's value.

        `[L,B,D]` at a position is not taken, and would be read as `[B,T,D]` where all are alike.
        """
        at_position, at_head = _axes(self.site)
        selected = ((at_position, self.position), (at_head, self.head))
        removed = [axis for axis, index in selected if index is not None]
        if self.site in UNSTACKED or self.layer is not None or not removed:
            return
        # The sizes of one layer's axes; None where both readings have the same axis.
        sizes: list[int | None] = [None] * _rank(self.site, config)
        sizes[0], sizes[at_position] = rows
        if self.site in HEAD_SITES:
            sizes[at_head] = config.n_kv_heads if self.site in KV_SITES else config.n_heads
        part = [size for axis, size in enumerate(sizes) if axis not in removed]
        of_all_layers = len(shape) == len(part) + 1 and all(
            size in (None, n) for n, size in zip(shape, (config.n_layers, *part), strict=True)
        )
        aligned = zip(reversed(shape), reversed(sizes), strict=False)
        if of_all_layers and all(n == 1 or size in (None, n) for n, size in aligned):
            must = "of all layers `[L,B,T,...]`, or of one layer `[B,T,...]`"
            do = "give value[i] with layer=i, or all layers at all positions and heads"
            raise ValueError(expected("value", must, f"shape {shape}, which could be either", do))

    def of_segment(self, i, layers, n_layers):  # noqa: D102
        edit = super().of_segment(i, layers, n_layers)
        if edit is None or edit is self:
            return edit
        value = jnp.asarray(edit.value)
        if value.ndim == 0 or value.shape[0] != len(layers):
            return edit
        # `change` indexes by the layer among all, so the segment's entries go to these places.
        around = (layers.start, n_layers - layers.stop)
        return replace(edit, value=jnp.pad(value, [around] + [(0, 0)] * (value.ndim - 1)))

    def change(self, value, layer, removed):  # noqa: D102
        other = jnp.asarray(self.value)
        if self.site in UNSTACKED or other.ndim <= value.ndim:
            return self.operand(value, removed)
        of_layer = jax.lax.dynamic_index_in_dim(other, layer, keepdims=False)
        return replace(self, value=of_layer).operand(value, removed)


def check_edits(edits: tuple, config: ModelConfig, n_rows: int, longest: int) -> None:
    """Raises for a site that the model does not have, and for an index that an edit cannot select.

    `longest` is the number of real tokens of the longest row.
    """
    absent = lacking(config)
    absent += ("mlp_in",) if "mlp_out" in absent else ()
    sites = tuple(site for site in EDIT_SITES if site not in absent)
    for edit in edits:
        if isinstance(edit, Edit):
            _check_site(edit, sites)
            n_heads = config.n_kv_heads if edit.site in KV_SITES else config.n_heads
            _check_index("layer", edit.layer, -config.n_layers, config.n_layers)
            _check_index("head", edit.head, 0, n_heads)
            _check_index("position", edit.position, -longest, longest, n_rows)
            _check_value(edit, len(config.segments))
        elif not callable(edit):
            do = "pass a tuple of Set, Add, Scale, Project, Replace or functions"
            raise TypeError(expected("edits", "made of edits", repr(edit), do))


def _check_site(edit: Edit, sites: tuple[str, ...]) -> None:
    if edit.site not in sites:
        do = "the model has no others"
        raise ValueError(expected("site", f"one of {sites}", repr(edit.site), do))
    if edit.site in UNSTACKED and edit.layer is not None:
        must, do = f"None at site {edit.site!r}", "it is outside of the layers"
        raise ValueError(expected("layer", must, edit.layer, do))
    if edit.head is not None and edit.site not in HEAD_SITES:
        do = "use site 'z' for a head's output"
        raise ValueError(expected("head", f"None at site {edit.site!r}", edit.head, do))


def _check_value(edit: Edit, n_segments: int) -> None:
    by_segment = isinstance(edit.value, tuple) and edit.site in SEGMENTED
    if by_segment and len(edit.value) != n_segments:
        must = f"an array, or a tuple of {n_segments}, one for each segment"
        do = "config.segments lists the segments"
        raise ValueError(expected("value", must, f"{len(edit.value)} values", do))
    parts = jax.tree.leaves(edit.value)
    arrays = [x if isinstance(x, jax.Array) else np.asarray(x) for x in parts]
    if not arrays or any(x.dtype.kind in "OUS" for x in arrays):
        do = "give what is set, added, multiplied, projected off or put in place"
        raise TypeError(expected("value", "numbers", repr(edit.value), do))


def _check_index(name: str, index: Any, low: int, high: int, n_rows: int | None = None) -> None:
    """Raises unless it is None or an integer in [low, high); with `n_rows`, or one for each row."""
    if index is None:
        return
    array = index if isinstance(index, jax.Array) else np.asarray(index)
    shapes = ((),) if n_rows is None else ((), (n_rows,))
    if array.shape not in shapes or not jnp.issubdtype(array.dtype, jnp.integer):
        must = "an integer" if n_rows is None else f"an integer, or one for each of {n_rows} rows"
        do = "use an edit for each, or leave it out to select all"
        raise TypeError(expected(name, must, repr(index), do))
    values = host(array)
    if values is not None and not ((low <= values) & (values < high)).all():
        do = "positions count real tokens" if n_rows else f"the model has {high} of them"
        raise IndexError(expected(name, f"in [{low}, {high})", index, do))
