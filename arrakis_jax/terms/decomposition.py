"""The terms of a sum, kept as factors until a result needs them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract, norm
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.ranking import Top, top
from arrakis_jax.results.record import Record
from arrakis_jax.results.table import Table
from arrakis_jax.results.terms import table_of_largest
from arrakis_jax.terms.factors import AnyFactor, Measured


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Decomposition(Record):
    """The terms of a sum, in the order in which the model writes them, as factors.

    A vector is kept as it is. A head is kept as `z` and the model's `w_o`, a neuron as its
    activation and `w_out`. No term is expanded until asked for. All terms are zero at padding.

    Attributes:
        first: `[n,B,T,D]`, the terms before the layers (embed, pos).
        layered: for each segment of layers, one factor per kind, stacked over the layers.
        labels: the name of each of the C terms.
    """

    first: Float[Array, "n B T D"]
    layered: tuple[tuple[AnyFactor, ...], ...]
    # Static: names are not arrays, so jit returns them as part of the pytree's structure.
    labels: Labels = field(metadata={"static": True})

    def project(self, directions: Float[Array, "N D"]) -> Float[Array, "C B T N"]:
        """Each term's inner product with each direction, without expanding any term.

        Summed over C they give the stream point's inner product with each direction.
        """
        directions = jnp.asarray(directions, self.first.dtype)
        if directions.ndim != 2 or directions.shape[1] != self.first.shape[-1]:
            must, do = f"`[N,{self.first.shape[-1]}]`", "stack directions on axis 0"
            raise ValueError(expected("directions", must, f"shape {directions.shape}", do))
        first = contract("C...D,ND->C...N", self.first, directions)
        return self._assemble(first, lambda factor: factor.project(directions))

    def along(self, direction: Float[Array, "B T D"]) -> Float[Array, "C B T"]:
        """Each term's inner product with one direction per position."""
        first = contract("C...D,...D->C...", self.first, direction)
        return self._assemble(first, lambda factor: factor.along(direction))

    def norms(self) -> Float[Array, "C B T"]:
        """Each term's Euclidean norm, without expanding any term."""
        return self._assemble(norm(self.first), lambda factor: factor.norms())

    def top(self, k: int) -> Top:
        """The k terms of largest norm at every position: `value` and `index`, `[k,B,T]`."""
        return top(self.norms(), k)

    def to_table(self, k: int | None = None) -> Table:
        """The norms, one row for each term, row and position; or the k largest at each position.

        A `Table` is a dict of columns: term, layer, kind, index, source, row, position (an index
        of the result's T axis), norm.
        """
        # A stream without a batch axis has no "row".
        axes = ("row", "position")[-(self.first.ndim - 2) :]
        return table_of_largest(self.norms(), self.labels, axes, k, "norm")

    @property
    def terms(self) -> Float[Array, "C B T D"]:
        """All terms as vectors; an error above 2 GiB (see `expand`)."""
        return self.expand()

    def expand(self, byte_limit: int = 2**31) -> Float[Array, "C B T D"]:
        """All terms as vectors.

        Raises:
            ValueError: if they would take more than `byte_limit` bytes.
        """
        shape = (len(self.labels), *self.first.shape[1:])
        size = prod(shape) * self.first.dtype.itemsize
        if size > byte_limit:
            must = f"at least the {size} bytes of terms of shape {shape}"
            do = "raise it, or use project, norms or top, which never expand"
            raise ValueError(expected("byte_limit", must, byte_limit, do))
        return self._assemble(self.first, lambda factor: factor.expand())

    def _assemble(self, first: Array, of: Callable[[Any], Array]) -> Array:
        """`first [n,...]` joined with `of(factor) [m,...]` of every layer, as `[C,...]`."""
        # One layer at a time: the intermediate arrays of `of` can be much larger than its result.
        layered = [
            tuple(Measured(jax.lax.map(of, factor), factor.kind) for factor in factors)
            for factors in self.layered
        ]
        return assembled(first, layered, self.labels)


def assembled(first: Array, layered: list[tuple[Measured, ...]], labels: Labels) -> Array:
    """Joins `first [n,...]` and each segment's kinds `[L,m,...]` as `[C,...]`, in writing order."""
    joined = []
    for kinds_of_segment in layered:
        values = [each.value for each in kinds_of_segment]
        layers = max((value.shape[0] for value in values), default=0)
        # At resid_mid the last layer has not written its MLP: zeros fill it up, and are cut below.
        padded = [jnp.pad(v, [(0, layers - v.shape[0])] + [(0, 0)] * (v.ndim - 1)) for v in values]
        if padded:
            # Kinds stand side by side within a layer, so that flattening gives the writing order.
            terms = jnp.concatenate(padded, axis=1)
            joined.append(terms.reshape(-1, *terms.shape[2:]))
    if not joined:
        return first
    # A span may begin after attention: the terms of that attention come first, and are cut off.
    rest = jnp.concatenate(joined)[labels.skipped :]
    return jnp.concatenate([first, rest])[: len(labels)]
