"""Sites, the one instrument in the code base: they tap, edit, zero at padding and record values.

A site is a named value of the forward, such as a layer's `z`. Logits alone are zeroed elsewhere, in
nn/transformer.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Int
from arrakis_jax.stream.padding import select_positions


@dataclass
class Sites:
    """The taps, edits and captures at the sites of one layer, or outside the layers.

    Attributes:
        capture: names of the sites to record.
        taps: arrays to add at sites: the gradient of a tap is the gradient at its site. Or
            functions of a site's value, as pytrees whose leaves are sliced by layer.
        edits: functions `(site, layer, value) -> value`. An edit can name one reader's input in an
            attribute `site`, or several in `reads`. Such a reader gets its own copy of the stream.
        layer: the layer, as a traced scalar; None outside the layers.
        mask: `[B,T]`, True at real tokens; None when every token is real.
        index, valid: `[B,N]`, the positions to record, or None for all.
        whole: names of sites to record at every position, whatever `index` says.
        records: the recorded values by site.
        edited: the names of the sites whose values an edit changed, collected while tracing.
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
    edited: set[str] = field(default_factory=set)

    def __call__(self, name: str, value: Array, *, axis: int = 1, at_padding: float = 0) -> Array:
        """Passes `value` through the site `name`; its position axis is `axis`."""
        # Taps come before edits: a gradient at a site then includes the effect of its edits.
        if name in self.taps:
            tap: Any = self.taps[name]
            is_array = hasattr(tap, "astype")
            value = value + tap.astype(value.dtype) if is_array else tap(value)
        for edit in self.edits:
            changed = edit(name, self.layer, value)
            # An edit of another site returns the value itself, and not a copy.
            if changed is not value:
                self.edited.add(name)
            value = changed
        # After the edits, so that no edit can write at padding.
        value = self.at_real(value, axis, at_padding)
        if name in self.capture:
            index = None if name in self.whole else self.index
            self.records[name] = select_positions(value, index, self.valid, axis, absent=at_padding)
        return value

    def splits(self, name: str) -> bool:
        """Whether a tap or an edit is at this reader's input, so that it needs its own copy."""
        named = ((getattr(e, "site", None), *getattr(e, "reads", ())) for e in self.edits)
        return name in self.taps or any(name in names for names in named)

    @property
    def unseen(self) -> "Sites":
        """Sites that only set padding: no taps, no edits, no records."""
        return Sites(layer=self.layer, mask=self.mask)

    def at_real(self, value: Array, axis: int = 1, at_padding: float = 0) -> Array:
        """`value` at real tokens, and the constant `at_padding` at padding."""
        if self.mask is None:
            return value
        shape = [1] * value.ndim
        shape[0], shape[axis] = self.mask.shape
        return jnp.where(self.mask.reshape(shape), value, at_padding)
