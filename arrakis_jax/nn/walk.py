"""The one walk over the layers of a model: a scan over the stacked blocks of each segment.

Layers with the same parameters are stacked, so that they compile once, whatever their number. A
model whose layers differ (dense ones, then experts) has several stacks, called segments. `walk`
takes the segments one after another. All code that goes over layers uses it.
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
    """The layer that a walk has reached.

    Attributes:
        block: the parameters of the layer.
        index: the number of the layer, traced.
        segment: the number of its segment, static.
    """

    block: Block
    index: Int[Array, ""]
    segment: int


@dataclass(frozen=True)
class PerSegment:
    """Values whose shapes differ between segments: an entry `[L_i,...]` or None for each."""

    entries: tuple


class Walked(NamedTuple):
    """The results of a walk.

    Attributes:
        state: the last state.
        by_segment: for each segment visited, the outputs of its steps, stacked over its layers.
    """

    state: Any
    by_segment: list[Any]

    @property
    def found(self) -> Any:
        """The outputs of all steps, stacked over all layers. All segments must share shapes."""
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
        step: the function called at each layer. It is traced once for each segment.
        state: the state for the first step.
        xs: a pytree whose leaves are arrays, with a row for each layer visited, or PerSegment. A
            step gets its layer's row as `x`.
        layers: the layers to visit, counted from 0, ascending; None for all.
        reverse: whether to go from the last layer to the first.
    """
    by_segment: list[Any] = []
    stretches = _stretches(model, xs, layers)
    for i, scanned in reversed(stretches) if reverse else stretches:
        # `i: int = i` keeps this segment's number: the loop changes `i`.
        def stepping(state: Any, scanned: tuple, i: int = i) -> tuple[Any, Any]:
            block, index, x = scanned
            return step(state, Place(block, index, i), x)

        state, outputs = jax.lax.scan(stepping, state, scanned, reverse=reverse)
        by_segment.append(outputs)
    # The results keep the order of the layers, whichever way the walk went.
    return Walked(state, by_segment[::-1] if reverse else by_segment)


def all_at_once(
    model: Any,
    function: Callable[[Place, Any], Any],
    xs: Any = (),
    *,
    layers: Sequence[int] | None = None,
) -> list[Any]:
    """A walk without a state: `function(place, x)`, stacked, for each segment visited.

    A scan would copy weights that the function returns; `vmap` does not.
    """

    def mapped(i: int, scanned: tuple) -> Any:
        return jax.vmap(lambda block, index, x: function(Place(block, index, i), x))(*scanned)

    return [mapped(i, scanned) for i, scanned in _stretches(model, xs, layers)]


def walk_from(
    model: Any, step: Callable[[Any, Place], Any], state: Any, start: Int[Array, ""]
) -> Any:
    """The last state of a walk from a traced layer on. One program serves every start.

    Unlike `walk`, it has no reverse-mode derivative: the length of its loop is traced.
    """
    for i, (blocks, layers) in enumerate(model.stacks()):

        def stepping(
            index: Array, state: Any, i: int = i, blocks: Block = blocks, first: int = layers.start
        ) -> Any:
            return step(state, Place(_entry(blocks, index - first), index, i))

        # A segment before the start has begin >= stop, and runs no step.
        begin = jnp.maximum(start, layers.start)
        state = jax.lax.fori_loop(begin, layers.stop, stepping, state)
    return state


def at_layer(
    model: Any, function: Callable[..., Any], layer: int | Int[Array, ""], *args: Any
) -> Any:
    """`function(block, layer, *args)` at one layer, which may be traced. No other is computed."""
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
    # Segments have different parameters, so a traced layer chooses between programs.
    segment_of_layer = np.repeat(np.arange(len(segments)), [len(layers) for _, layers in segments])
    return jax.lax.switch(jnp.asarray(segment_of_layer)[layer], branches, layer, *args)


def _entry(blocks: Block, row: Int[Array, ""]) -> Block:
    """The parameters of one layer."""
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, row, keepdims=False), blocks)


def _stretches(model: Any, xs: Any, layers: Sequence[int] | None) -> list[tuple[int, tuple]]:
    """For each segment visited: its number, then the blocks, numbers and `xs` of its layers."""
    stretches, begin = [], 0
    for i, (blocks, members) in enumerate(model.stacks()):
        wanted = members if layers is None else [layer for layer in layers if layer in members]
        if layers is not None and not wanted:
            continue
        rows, numbers = rows_of(members, wanted), np.array(wanted, np.int32)
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
    """The layer numbers of each entry of `Walked.by_segment`, in a walk over these layers."""
    segments = [tuple(members) for _, members in model.stacks()]
    if layers is None:
        return segments
    chosen = [tuple(layer for layer in layers if layer in members) for members in segments]
    return [members for members in chosen if members]


def rows_of(held: Sequence[int], wanted: Sequence[int]) -> slice | np.ndarray | None:
    """The rows of the wanted layers among the layers held; None if all are wanted in order.

    Consecutive layers give a slice, which copies less than a gather.
    """
    if list(wanted) == list(held):
        return None
    rows = [list(held).index(layer) for layer in wanted]
    begin = rows[0] if rows else 0
    if rows == list(range(begin, begin + len(rows))):
        return slice(begin, begin + len(rows))
    return np.array(rows)
