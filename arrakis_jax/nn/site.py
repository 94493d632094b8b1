"""The one instrument in the code base: tap, edit, record."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Int
from arrakis_jax.stream.padding import select_positions


@dataclass
class Sites:
    """What happens at the sites of one layer (or, with `layer=None`, outside the layers).

    Attributes:
        capture: names of the sites to record.
        taps: arrays added at sites, with respect to which the gradient is the site's; or functions
            of a site's value, pytrees whose leaves are sliced by layer.
        edits: functions `(site, layer, value) -> value`. One with an attribute `site` that names a
            reader's input, or `reads` that names several, has that reader read by itself.
        layer: the layer, as a traced scalar.
        mask: `[B,T]`, True at real tokens; None when every token is real.
        index, valid: `[B,N]`, the positions to record, or None for all.
        whole: names of sites to record at every position all the same.
        records: what was recorded.
    """

    capture: frozenset[str] = frozenset()
    taps: dict[str, Any] = field(default_factory=dict)
    edits: tuple[Callable, ...] = ()
    layer: Int[Array, ""] | None = None
    mask: Bool[Array, "B T"] | None = None
    index: Int[Array, "B N"] | None = None
    valid: Bool[Array, "B N"] | None = None
    whole: frozenset[str] = frozenset()
    records: dict[str, Array] = field(default_factory=dict)

    def __call__(self, name: str, value: Array, *, axis: int = 1, at_padding: float = 0) -> Array:
        """Passes `value` through the site `name`; its position axis is `axis`."""
        if name in self.taps:
            tap: Any = self.taps[name]
            is_array = hasattr(tap, "astype")
            value = value + tap.astype(value.dtype) if is_array else tap(value)
        for edit in self.edits:
            value = edit(name, self.layer, value)
        value = self.at_real(value, axis, at_padding)
        if name in self.capture:
            index = None if name in self.whole else self.index
            self.records[name] = select_positions(value, index, self.valid, axis, absent=at_padding)
        return value

    def splits(self, name: str) -> bool:
        """Whether a tap or an edit is at this reader's input, which then is one of its own."""
        named = ((getattr(e, "site", None), *getattr(e, "reads", ())) for e in self.edits)
        return name in self.taps or any(name in names for names in named)

    @property
    def unseen(self) -> "Sites":
        """Sites that only keep padding as it is."""
        return Sites(layer=self.layer, mask=self.mask)

    def at_real(self, value: Array, axis: int = 1, at_padding: float = 0) -> Array:
        """`value` at real tokens and the constant at padding."""
        if self.mask is None:
            return value
        shape = [1] * value.ndim
        shape[0], shape[axis] = self.mask.shape
        return jnp.where(self.mask.reshape(shape), value, at_padding)
