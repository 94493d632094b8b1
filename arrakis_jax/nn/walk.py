"""The one walk over the layers of a model: a scan over the stacked blocks of each segment.

Layers with the same parameters are stacked: they compile once, whatever their number. A model whose
layers differ (dense ones, then experts) holds several stacks, its segments. Everything that goes
over layers goes through `walk`, which takes the segments one after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.nn.block import Block


class Place(NamedTuple):
    """Where a walk is.

    Attributes:
        block: the parameters of one layer.
        index: the number of the layer, traced.
        segment: the number of the segment that holds it, static.
    """

    block: Block
    index: Int[Array, ""]
    segment: int


@dataclass(frozen=True)
class PerSegment:
    """Values whose shapes differ between segments: for each segment `[L_i,...]`, or None."""

    entries: tuple


class Walked(NamedTuple):
    """What a walk leaves.

    Attributes:
        state: the last state.
        by_segment: for each segment gone over, what the steps found, stacked over its layers.
    """

    state: Any
    by_segment: list[Any]

    @property
    def found(self) -> Any:
        """What the steps found, stacked over all layers; for shapes that do not differ."""
        if len(self.by_segment) == 1:
            return self.by_segment[0]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *self.by_segment)


Step = Callable[[Any, Place, Any], tuple[Any, Any]]


def walk(
    model: Any,
    step: Step,
    state: Any,
    xs: Any = (),
    *,
    layers: Sequence[int] | None = None,
    reverse: bool = False,
) -> Walked:
    """Goes over the layers, first to last: `step(state, place, x) -> (state, found)`.

    Args:
        model: the transformer.
        step: what is done at a layer. It is traced once for each segment.
        state: what the first step gets.
        xs: a pytree of PerSegment, or of arrays with a row for each layer that is gone over. A step
            gets its layer's row as `x`.
        layers: the layers to go over, counted from 0, ascending; None for all.
        reverse: whether to go from the last layer to the first.
    """
    by_segment: list[Any] = []
    stretches = _stretches(model, xs, layers)
    for i, scanned in reversed(stretches) if reverse else stretches:

        def stepping(state: Any, scanned: tuple, i: int = i) -> tuple[Any, Any]:
            block, index, x = scanned
            return step(state, Place(block, index, i), x)

        state, found = jax.lax.scan(stepping, state, scanned, reverse=reverse)
        by_segment.append(found)
    return Walked(state, by_segment[::-1] if reverse else by_segment)


def all_at_once(
    model: Any,
    function: Callable[[Place, Any], Any],
    xs: Any = (),
    *,
    layers: Sequence[int] | None = None,
) -> list[Any]:
    """For each segment gone over `function(place, x)`, stacked: a walk without a state.

    All layers are computed together (`vmap`), so weights that the function hands on are not copied.
    """

    def mapped(i: int, scanned: tuple) -> Any:
        return jax.vmap(lambda block, index, x: function(Place(block, index, i), x))(*scanned)

    return [mapped(i, scanned) for i, scanned in _stretches(model, xs, layers)]


def walk_from(
    model: Any, step: Callable[[Any, Place], Any], state: Any, start: Int[Array, ""]
) -> Any:
    """The last state of a walk from a traced layer on: one program serves every start.

    A loop whose length is traced has no reverse-mode derivative, unlike `walk`.
    """
    for i, (blocks, layers) in enumerate(model.stacks()):

        def stepping(
            index: Array, state: Any, i: int = i, blocks: Block = blocks, first: int = layers.start
        ) -> Any:
            return step(state, Place(_entry(blocks, index - first), index, i))

        begin = jnp.maximum(start, layers.start)
        state = jax.lax.fori_loop(begin, layers.stop, stepping, state)
    return state


def at_layer(
    model: Any, function: Callable[..., Any], layer: int | Int[Array, ""], *args: Any
) -> Any:
    """`function(block, layer, *args)` of one layer, which may be traced; no other is computed."""
    segments = model.stacks()
    if isinstance(layer, int):
        blocks, layers = next(stack for stack in segments if layer in stack[1])
        block = jax.tree.map(lambda w: w[layer - layers.start], blocks)
        return function(block, layer, *args)

    def in_segment(blocks: Block, first: int) -> Callable:
        return lambda layer, *args: function(_entry(blocks, layer - first), layer, *args)

    branches = [in_segment(blocks, layers.start) for blocks, layers in segments]
    if len(branches) == 1:
        return branches[0](layer, *args)
    segment_of_layer = np.repeat(np.arange(len(segments)), [len(layers) for _, layers in segments])
    return jax.lax.switch(jnp.asarray(segment_of_layer)[layer], branches, layer, *args)


def _entry(blocks: Block, row: Int[Array, ""]) -> Block:
    """One layer's parameters."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, row, keepdims=False), blocks)


def _stretches(model: Any, xs: Any, layers: Sequence[int] | None) -> list[tuple[int, tuple]]:
    """For each segment gone over its number, and the blocks, numbers and `xs` of its layers."""
    stretches, begin = [], 0
    for i, (blocks, own) in enumerate(model.stacks()):
        wanted = own if layers is None else [layer for layer in layers if layer in own]
        if layers is not None and not wanted:
            continue
        rows, numbers = rows_of(own, wanted), np.array(wanted, np.int32)
        blocks = jax.tree.map(lambda w, rows=rows: w if rows is None else w[rows], blocks)
        end = begin + len(wanted)

        def entries(x: Any, i: int = i, begin: int = begin, end: int = end) -> Any:
            if isinstance(x, PerSegment):
                return x.entries[i]
            return x if end - begin == x.shape[0] else x[begin:end]

        stretches.append((i, (blocks, jnp.asarray(numbers), jax.tree.map(entries, xs))))
        begin = end
    return stretches


def segment_layers(model: Any, layers: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """The layers that a walk over these goes over, for each entry of what it finds."""
    segments = [tuple(own) for _, own in model.stacks()]
    if layers is None:
        return segments
    chosen = [tuple(layer for layer in layers if layer in own) for own in segments]
    return [own for own in chosen if own]


def rows_of(held: Sequence[int], wanted: Sequence[int]) -> slice | np.ndarray | None:
    """Where these layers stand among those held; None for all.

    Layers that follow one another are a slice, which copies less than a gather.
    """
    if list(wanted) == list(held):
        return None
    rows = [list(held).index(layer) for layer in wanted]
    begin = rows[0] if rows else 0
    if rows == list(range(begin, begin + len(rows))):
        return slice(begin, begin + len(rows))
    return np.array(rows)
