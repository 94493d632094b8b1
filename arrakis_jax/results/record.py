"""The base of every result: a dataclass that prints the shapes of its arrays."""

from dataclasses import fields
from typing import Any


class Record:
    """A dataclass that prints the shapes of its arrays instead of their values."""

    # Values may be gigabytes on a device, or traced; shapes are always at hand.

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # pyright: ignore
        shown = (f"{name}={_shown(value)}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    # A field with a part for each segment of layers prints the shape of each part.
    if isinstance(value, tuple) and any(
        isinstance(v, Record) or hasattr(v, "shape") for v in value
    ):
        return f"({', '.join(map(_shown, value))})"
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"{getattr(value, 'dtype', '')}{list(shape)}"


# The default of a field that may be missing. It has no type of its own, so that the field keeps the
# type of its array; `ResidualStream.need` guards the use.
ABSENT: Any = None
