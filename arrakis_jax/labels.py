"""Names of the terms of a decomposition: static and compact, whatever their number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload


class Label(NamedTuple):
    """The name of one term.

    Attributes:
        layer: the layer that writes it; None for embeddings.
        kind: embed, pos, attn, head, attn_bias, mlp, attn_rounding or mlp_rounding.
        index: which head; None for kinds of which a layer has one.
        source: the source position, in decompositions by source; else None.
    """

    layer: int | None
    kind: str
    index: int | None = None
    source: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"L{self.layer} "
        return f"{layer}{self.kind}" + ("" if self.index is None else f" {self.index}")


@dataclass(frozen=True)
class Labels(Sequence):
    """The labels of a decomposition's terms, in the order in which the model writes them.

    Attributes:
        first: kinds before the layers, one term each.
        layers: the layers listed.
        kinds: what each layer holds: `(kind, count)`, with count 0 for one term without an index.
        dropped: how many terms are missing at the end, because the last layer is cut there.
    """

    first: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[tuple[str, int], ...]
    dropped: int = 0

    @property
    def per_layer(self) -> int:
        """How many terms a whole layer has."""
        return sum(max(count, 1) for _, count in self.kinds)

    def __len__(self) -> int:
        return len(self.first) + len(self.layers) * self.per_layer - self.dropped

    @overload
    def __getitem__(self, i: int) -> Label: ...

    @overload
    def __getitem__(self, i: slice) -> tuple[Label, ...]: ...

    def __getitem__(self, i: int | slice) -> Label | tuple[Label, ...]:
        """The label of term `i`, or those of a slice."""
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(f"`i` must be in [{-len(self)}, {len(self)}), got {i}; see len()")
        i = int(i) % len(self)
        if i < len(self.first):
            return Label(None, self.first[i])
        layer, rest = divmod(i - len(self.first), self.per_layer)
        for kind, count in self.kinds:
            if rest < max(count, 1):
                return Label(self.layers[layer], kind, rest if count else None)
            rest -= max(count, 1)
        raise AssertionError("labels do not cover their own length")

    def __iter__(self) -> Iterator[Label]:
        return (self[i] for i in range(len(self)))

    def start(self, kind: str) -> int:
        """Where in a layer's terms this kind starts."""
        start = 0
        for name, count in self.kinds:
            if name == kind:
                return start
            start += max(count, 1)
        kinds = tuple(name for name, _ in self.kinds)
        raise ValueError(f"`kind` must be one of {kinds}, got {kind!r}; choose another `by`")

    def where(self, kind: str) -> list[int]:
        """The indices of every term of this kind; ValueError if there is no such kind."""
        if kind not in self.first:
            self.start(kind)
        return [i for i, label in enumerate(self) if label.kind == kind]
