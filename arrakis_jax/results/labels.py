"""Names of the terms of a decomposition: static and compact, whatever their number."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeVar, overload

from arrakis_jax.core.errors import expected

T = TypeVar("T")


class LazyLabels(Sequence[T]):
    """A long sequence of labels that makes each label when it is asked for.

    A subclass defines `__len__`, and `_label(i)` for i in [0, len).
    """

    @abstractmethod
    def _label(self, i: int) -> T: ...

    @overload
    def __getitem__(self, i: int) -> T: ...

    @overload
    def __getitem__(self, i: slice) -> tuple[T, ...]: ...

    def __getitem__(self, i: int | slice) -> T | tuple[T, ...]:
        """Label `i`, or those of a slice."""
        if isinstance(i, slice):
            return tuple(self[j] for j in range(*i.indices(len(self))))
        if not -len(self) <= i < len(self):
            raise IndexError(expected("i", f"in [{-len(self)}, {len(self)})", i, "see len()"))
        return self._label(int(i) % len(self))

    def __iter__(self) -> Iterator[T]:
        return (self[i] for i in range(len(self)))


class Label(NamedTuple):
    """The name of one term.

    Attributes:
        layer: the layer that writes it; None for embeddings.
        kind: embed, pos, attn, head, attn_bias, mlp, neuron, mlp_bias, expert, shared_expert,
            norm_bias, attn_rounding or mlp_rounding.
        index: which head, neuron or expert. None for a kind that a layer has once. The bias of the
            norm of attention's output is norm_bias 0, that of the MLP's output norm_bias 1.
        source: in decompositions by source, the column of `tokens` that a head read; else None.
    """

    layer: int | None
    kind: str
    index: int | None = None
    source: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"L{self.layer} "
        index = "" if self.index is None else f" {self.index}"
        return f"{layer}{self.kind}{index}" + ("" if self.source is None else f" @ {self.source}")


class Kind(NamedTuple):
    """Terms of one kind in one layer.

    Attributes:
        name: the kind.
        indices: the heads, neurons... that have a term; None for one term without an index.
        sources: how many source positions each term is split into; None for no split.
    """

    name: str
    indices: range | None = None
    sources: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes along which the terms are counted."""
        indices = () if self.indices is None else (len(self.indices),)
        return indices if self.sources is None else (*indices, self.sources)

    @property
    def count(self) -> int:
        """How many terms."""
        return prod(self.shape)

    def label(self, layer: int, i: int) -> Label:
        """The label of the i-th of these terms."""
        i, source = (i, None) if self.sources is None else divmod(i, self.sources)
        return Label(layer, self.name, None if self.indices is None else self.indices[i], source)


class Segment(NamedTuple):
    """Layers that hold terms of the same kinds, in the order in which they are written."""

    layers: tuple[int, ...]
    kinds: tuple[Kind, ...]

    @property
    def per_layer(self) -> int:
        """How many terms a whole layer has."""
        return sum(kind.count for kind in self.kinds)

    def offsets(self, name: str) -> list[int]:
        """The places of this kind's terms among the terms of a layer."""
        places, start = [], 0
        for kind in self.kinds:
            if kind.name == name:
                places += range(start, start + kind.count)
            start += kind.count
        return places


@dataclass(frozen=True)
class Labels(LazyLabels[Label]):
    """The labels of a decomposition's terms, in the order in which the model writes them.

    Attributes:
        first: kinds before the layers, one term each.
        segments: the layers listed, and the kinds of each.
        dropped: how many terms the last layer lacks at its end, if the decomposition ends inside
            it.
        skipped: how many terms the first layer lacks at its start, if the decomposition begins
            inside it.
    """

    first: tuple[str, ...]
    segments: tuple[Segment, ...]
    dropped: int = 0
    skipped: int = 0

    def __repr__(self) -> str:
        parts = list(self.first)
        for layers, kinds in self.segments:
            named = (f"{' x '.join(map(str, k.shape))} {k.name}".lstrip() for k in kinds)
            parts.append(f"in layers {_ranges(layers)}: {' + '.join(named)}")
        return f"Labels({len(self)} terms: {', '.join(parts)})"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers listed."""
        return tuple(layer for segment in self.segments for layer in segment.layers)

    def __len__(self) -> int:
        listed = sum(len(s.layers) * s.per_layer for s in self.segments)
        return len(self.first) + listed - self.dropped - self.skipped

    def _label(self, i: int) -> Label:
        if i < len(self.first):
            return Label(None, self.first[i])
        # `rest` counts the terms before `i`, as if the first layer were whole. Whole segments are
        # taken off it, then whole layers, then kinds.
        rest = i - len(self.first) + self.skipped
        for segment in self.segments:
            if rest >= len(segment.layers) * segment.per_layer:
                rest -= len(segment.layers) * segment.per_layer
                continue
            layer, rest = divmod(rest, segment.per_layer)
            for kind in segment.kinds:
                if rest < kind.count:
                    return kind.label(segment.layers[layer], rest)
                rest -= kind.count
        raise AssertionError("labels do not cover their own length")

    def check(self, kind: str) -> None:
        """Raises ValueError unless some layer has this kind."""
        # A dict keeps the order of the model, which a set would lose.
        kinds = tuple({k.name: None for segment in self.segments for k in segment.kinds})
        if kind not in kinds:
            raise ValueError(f"`kind` must be one of {kinds}, got {kind!r}; choose another `by`")

    def where(self, kind: str) -> list[int]:
        """The indices of every term of this kind; ValueError if there is no such kind."""
        if kind not in self.first:
            self.check(kind)
        return [i for i, label in enumerate(self) if label.kind == kind]


def _ranges(numbers: tuple[int, ...]) -> str:
    """Ascending numbers as text, such as "0-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
