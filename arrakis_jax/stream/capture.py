"""What a forward returns: a selection of fields, layers and positions, as a value."""

from collections.abc import Iterable
from dataclasses import dataclass

from arrakis_jax.core.checks import as_tuple
from arrakis_jax.core.errors import expected
from arrakis_jax.stream.fields import FIELDS, SCALES, STREAM


@dataclass(frozen=True)
class Capture:
    """What a forward returns; the selection is made inside the forward.

    Attributes:
        fields: names of ResidualStream fields, and "logits".
        layers: the layers to keep, or None for all; negative ones count from the end.
        positions: the positions to keep, counted in real tokens, or None for all; -1 is each
            row's last real token. Logits are kept at the same positions.
    """

    fields: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if isinstance(self.fields, str) or not isinstance(self.fields, Iterable):
            do = f"write ({self.fields!r},) for one"
            raise TypeError(expected("fields", "a tuple of names", repr(self.fields), do))
        object.__setattr__(self, "fields", tuple(self.fields))  # a list would not hash
        for name in ("layers", "positions"):
            object.__setattr__(self, name, as_tuple(name, getattr(self, name)))
        unknown = [name for name in self.fields if name not in (*FIELDS, "logits")]
        if unknown:
            do = "name such fields"
            if "resid_post" in unknown:
                do = "resid_post is read from 'resid_pre' and 'final': name these"
            raise ValueError(expected("capture", f"made of {(*FIELDS, 'logits')}", unknown, do))


DEFAULT_CAPTURE = Capture(("logits", *STREAM, *SCALES))
CAPTURES = {"residuals": DEFAULT_CAPTURE, "all": Capture(("logits", *FIELDS))}


def as_capture(capture: "str | tuple[str, ...] | Capture") -> Capture:
    """Any accepted spelling of a capture, as a Capture."""
    if isinstance(capture, Capture):
        return capture
    if isinstance(capture, str):
        if capture not in CAPTURES:
            do = f"for one field write ({capture!r},)"
            raise ValueError(expected("capture", f"one of {tuple(CAPTURES)}", repr(capture), do))
        return CAPTURES[capture]
    if not isinstance(capture, Iterable):
        must, do = "'residuals', 'all', field names or a Capture", "name what to keep"
        raise TypeError(expected("capture", must, repr(capture), do))
    return Capture(tuple(capture))
