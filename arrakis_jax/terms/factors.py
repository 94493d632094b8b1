"""Terms of one kind, kept as coefficients and directions until a result needs them.

All functions take one layer. A caller maps them over a layer axis.
"""
# A term is a coefficient times a direction that is a weight. All terms of a layer as vectors take
# `[m,B,T,D]`, far more memory than the model. So inner products and norms are computed from the
# factors, and only `expand` makes vectors.

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.numerics import contract, norm
from arrakis_jax.results.labels import Kind
from arrakis_jax.results.record import Record


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Factor(Record):
    """The m terms of one kind.

    Attributes:
        coefficient: one vector `[B,T,D]`, or `[B,T,m,K]`: the z of heads, activations...
        direction: None for one vector, or `[m,K,D]`: the w_o of heads, the w_out of neurons...
        kind: the name and the indices of the terms.
    """

    coefficient: Array
    direction: Array | None
    kind: Kind = field(metadata={"static": True})

    def project(self, directions: Float[Array, "N D"]) -> Float[Array, "m B T N"]:
        """Inner products with directions."""
        if self.direction is None:
            return contract("...D,ND->...N", self.coefficient, directions)[None]
        # Weights meet the directions first: this product has neither B nor T.
        read = contract("mKD,ND->NmK", self.direction, directions)
        return contract("...mK,NmK->m...N", self.coefficient, read)

    def along(self, direction: Float[Array, "B T D"]) -> Float[Array, "m B T"]:
        """Inner products with one direction per position."""
        if self.direction is None:
            return contract("...D,...D->...", self.coefficient, direction)[None]
        read = contract("...D,mKD->...mK", direction, self.direction)
        # An elementwise product and a sum: on CPU, an einsum of B T m short vectors is slow.
        return jnp.moveaxis(jnp.sum(_wide(self.coefficient) * read, -1), -1, 0)

    def norms(self) -> Float[Array, "m B T"]:
        """Euclidean norms."""
        if self.direction is None:
            return norm(self.coefficient)[None]
        if self.direction.shape[1] == 1:
            # A neuron: |a w| = |a| |w|.
            size_m = norm(_wide(self.direction[:, 0]))
            return contract("...m,m->m...", jnp.abs(self.coefficient[..., 0]), size_m)
        # Q keeps lengths, so the triangle R of a QR gives the norm without the D axis.
        return norm(contract("...mK,mJK->m...J", self.coefficient, _triangles(self.direction)))

    def expand(self) -> Float[Array, "m B T D"]:
        """The vectors."""
        if self.direction is None:
            return self.coefficient[None]
        return contract("...mK,mKD->m...D", self.coefficient, self.direction)

    def carried(self, share: Float[Array, "B T"], through: Callable[[Array], Array]) -> "Factor":
        """The terms after a linear map: `share` is a factor per position, `through` a matrix."""
        if self.direction is None:
            return replace(self, coefficient=through(self.coefficient) * share[..., None])
        # The map is applied to the weights, which have no positions: the term stays a factor.
        coefficient = self.coefficient * share[..., None, None]
        return replace(self, coefficient=coefficient, direction=through(self.direction))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Sources(Record):
    """The terms of heads, split by source position, m = (h, s): `pattern_hts v_s w_o[h]`.

    Attributes:
        pattern: `[B,H,T,S]`, attention probabilities, times any factor on the head's output.
        v: `[B,S,G,K]`, values.
        direction: `[H,K,D]`, w_o.
        kind: the name and the indices of the terms.
    """

    pattern: Array
    v: Array
    direction: Array
    kind: Kind = field(metadata={"static": True})

    def project(self, directions: Float[Array, "N D"]) -> Float[Array, "m B T N"]:
        """Inner products with directions."""
        read = self._grouped(contract("HKD,ND->HKN", self.direction, directions))
        # Values meet w_o once for each source. Only the pattern has both T and S.
        sizes = contract("...SGK,GRKN->...GRSN", self.v, read)
        terms = self.pattern[..., None] * self._flat(sizes, -3)[..., None, :, :]
        # `[B,H,T,S,N]` as `[B,H,N,T,S]`, which `_counted` takes.
        return self._counted(jnp.moveaxis(terms, -1, -3), 1)

    def along(self, direction: Float[Array, "B T D"]) -> Float[Array, "m B T"]:
        """Inner products with one direction per position."""
        read = contract("HKD,...D->H...K", self.direction, direction)
        sizes = contract("GR...TK,...SGK->...GRTS", self._grouped(read), self.v)
        return self._counted(self.pattern * self._flat(sizes, -3), 0)

    def norms(self) -> Float[Array, "m B T"]:
        """Euclidean norms."""
        triangles = self._grouped(_triangles(self.direction))
        sizes = norm(contract("...SGK,GRJK->...GRSJ", self.v, triangles))
        return self._counted(jnp.abs(self.pattern) * self._flat(sizes, -2)[..., None, :], 0)

    def expand(self) -> Float[Array, "m B T D"]:
        """The vectors."""
        written = contract("...SGK,GRKD->...GRSD", self.v, self._grouped(self.direction))
        terms = self.pattern[..., None] * self._flat(written, -3)[..., None, :, :]
        return self._counted(jnp.moveaxis(terms, -1, -3), 1)

    def carried(self, share: Float[Array, "B T"], through: Callable[[Array], Array]) -> "Sources":
        """The terms after a linear map: `share` is a factor per position, `through` a matrix."""
        # The factor belongs to the position that is written to, which is axis T of the pattern.
        pattern = self.pattern * share[..., None, :, None]
        return replace(self, pattern=pattern, direction=through(self.direction))

    def _grouped(self, of_heads: Array) -> Array:
        """`[H,...]` as `[G,R,...]`: query heads by the key/value head that they read."""
        return rearrange(of_heads, "(G R) ... -> G R ...", G=self.v.shape[-2])

    @staticmethod
    def _flat(grouped: Array, last: int) -> Array:
        """`[...,G,R,...]` as `[...,H,...]`; R stands at axis `last`, counted from the end."""
        axis = grouped.ndim + last - 1
        shape = grouped.shape
        return grouped.reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])

    @staticmethod
    def _counted(terms: Array, others: int) -> Array:
        """`[...,H,n,T,S]` as `[H * S,...,T,n]`; `others` is the number of axes n, 0 or 1."""
        # H and S go to the front together, as terms are counted by head and then by source.
        terms = jnp.moveaxis(terms, (-3 - others, -1), (0, 1))
        terms = terms.reshape(-1, *terms.shape[2:])
        return jnp.moveaxis(terms, -2, -1) if others else terms


AnyFactor = Factor | Sources


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Measured(Record):
    """A number for each of the m terms of one kind.

    Attributes:
        value: `[m,...]`.
        kind: the name and the indices of the terms.
    """

    value: Array
    kind: Kind = field(metadata={"static": True})


def measured(factors: tuple[AnyFactor, ...], of: Callable[[Any], Array]) -> tuple[Measured, ...]:
    """A function of each factor, with the factor's kind."""
    return tuple(Measured(of(factor), factor.kind) for factor in factors)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _triangles(w_mKD: Float[Array, "m K D"]) -> Float[Array, "m J K"]:
    """The triangle R of each `W^T = Q R`. So `|z W| = |z R^T|` exactly, with K numbers, not D."""
    return jnp.linalg.qr(jnp.swapaxes(_wide(w_mKD), -1, -2), mode="r")
