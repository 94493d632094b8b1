"""A number for each term of a decomposition: read by kind, by layer, the largest, as a table."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.errors import expected
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.ranking import Top, top
from arrakis_jax.results.record import Record
from arrakis_jax.results.table import Table, table_of


class TermValues(Record):
    """The base of results that hold a number for each of C terms.

    Attributes:
        terms: `[C,B]`, `[C,B,T]`, or with more axes.
        labels: what each term is.
    """

    terms: Any
    labels: Any

    def by_layer(self, kind: str) -> Float[Array, "L B"]:
        """The terms of one kind as `[L,B]` (attn, mlp...) or `[L,n,B]` (head, neuron, expert).

        L counts the layers that have the kind. Heads by source are `[L,H,S,B]`.

        Raises:
            ValueError: for a kind that no layer has, or that has another number of terms in some
                layers; for a decomposition that begins or ends inside a layer.
        """
        labels: Labels = self.labels
        labels.check(kind)
        if labels.dropped or labels.skipped:
            do = "take the terms by `labels.where(kind)`"
            raise ValueError(expected("labels", "of whole layers", "a layer that is cut", do))
        terms_by_segment, start = [], len(labels.first)
        for segment in labels.segments:
            # The terms of a segment are [layer, term of the layer], flattened.
            size, columns = len(segment.layers) * segment.per_layer, segment.offsets(kind)
            if columns:
                terms = self.terms[start : start + size]
                terms = terms.reshape(len(segment.layers), segment.per_layer, *terms.shape[1:])
                # A kind that a layer lists once keeps its axes, such as head and source.
                shapes = [k.shape for k in segment.kinds if k.name == kind]
                axes = shapes[0] if len(shapes) == 1 else (len(columns),)
                terms = terms[:, np.array(columns)]
                terms_by_segment.append(terms.reshape(len(terms), *axes, *terms.shape[2:]))
            start += size
        widths = {terms.shape[1:] for terms in terms_by_segment}
        if len(widths) > 1:
            got = f"{sorted(widths)} in different layers"
            do = "take the terms by `labels.where(kind)`"
            raise ValueError(expected("kind", "of one number of terms in every layer", got, do))
        return jnp.concatenate(terms_by_segment)

    def _sources(self, kind: str) -> list[int | None]:
        """How many sources each segment splits a kind into."""
        kinds = (k for segment in self.labels.segments for k in segment.kinds)
        return [k.sources for k in kinds if k.name == kind]

    def by_head(self) -> Float[Array, "L H B"]:
        """The heads' terms as `[L,H,B]` (`[L,H,B,T]`), summed over sources."""
        heads = self.by_layer("head")
        return heads if self._sources("head")[0] is None else heads.sum(2)

    def by_source(self) -> Float[Array, "L H S B"]:
        """The heads' terms by source position, `[L,H,S,B]` (`[L,H,S,B,T]`).

        S counts the columns of `tokens`; terms of padding are zero.
        """
        if all(n_sources is None for n_sources in self._sources("head")):
            do = "ask for by='source'"
            raise ValueError(expected("labels", "by source", "terms that are not", do))
        return self.by_layer("head")

    def top(self, k: int) -> Top:
        """The k terms of largest absolute value: their values and indices, `[k,B]` each."""
        return top(self.terms, k)

    def to_table(self, k: int | None = None) -> Table:
        """One row for each term, row of the batch and position; or the k largest of each.

        A `Table` is a dict of columns: term, layer, kind, index, source, row, position (an index
        of the result's T axis, if it has one), value.
        """
        axes = ("row", "position", "direction")[: self.terms.ndim - 1]
        return table_of_largest(self.terms, self.labels, axes, k, "value")


def table_of_largest(
    values: Array, labels: Labels, axes: tuple[str, ...], k: int | None, name: str
) -> Table:
    """The table of all values `[C,...]`, or of the k largest of each."""
    if k is None:
        return table_of(values, labels, axes, name)
    value, index = top(values, k)
    return table_of(value, labels, axes, name, np.asarray(index))
