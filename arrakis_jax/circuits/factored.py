"""A matrix as the product of two thin factors, which is never formed."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Complex

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.results.record import Record


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Factored(Record):
    """A matrix `left @ right` of rank at most K, which is never formed.

    With more axes in front it holds many matrices: `f[layer, head]` is one of them.

    Attributes:
        left: `[...,D,K]`.
        right: `[...,K,D]`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> ov = ov_matrices(model)
        >>> ov, ov[3, 1].singular_values().shape
        (Factored(left=float32[4, 4, 128, 64], right=float32[4, 4, 64, 128]), (64,))
    """

    left: Float[Array, "... D K"]
    right: Float[Array, "... K D"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the matrix would have."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def transposed(self) -> "Factored":
        """The transposed matrix, `right^T left^T`."""
        return Factored(
            left=jnp.swapaxes(self.right, -1, -2), right=jnp.swapaxes(self.left, -1, -2)
        )

    @property
    def core(self) -> Float[Array, "... K K"]:
        """`right @ left`, which has the matrix's trace and nonzero eigenvalues."""
        self._need_square()
        return contract("...KD,...DM->...KM", self.right, self.left)

    def frobenius(self) -> Float[Array, "..."]:
        """The Frobenius norm, the root of the sum of squared entries."""
        return jnp.linalg.norm(self._between()[1], axis=(-2, -1))

    def singular_values(self) -> Float[Array, "... K"]:
        """The min(D, K) singular values that may differ from zero, in descending order."""
        return jnp.linalg.svd(self._between()[1], compute_uv=False)

    def svd(
        self,
    ) -> tuple[Float[Array, "... D K"], Float[Array, "... K"], Float[Array, "... K D"]]:
        """`(u, s, vt)` with `u * s @ vt` the matrix: both factors' QR, then the SVD of K x K."""
        # matrix = columns middle rows^T, with orthonormal columns and rows.
        (columns, rows), middle = self._between()
        u, s, vt = jnp.linalg.svd(middle, full_matrices=False)
        vt = contract("...MK,...DK->...MD", vt, rows)
        return contract("...DK,...KM->...DM", columns, u), s, vt

    def trace(self) -> Float[Array, "..."]:
        """The trace, the sum of the eigenvalues."""
        self._need_square()
        return contract("...DK,...KD->...", self.left, self.right)

    def eigenvalues(self) -> Complex[np.ndarray, "... K"]:
        """The eigenvalues of `core`, complex: all that may differ from zero.

        Numpy computes them on the host, for all matrices at once, because JAX has no eigenvalues
        of nonsymmetric matrices on every platform. So this cannot be traced or exported.

        Raises:
            TypeError: inside of jit, vmap or grad.
        """
        return eigenvalues(self.core)

    def expand(self, byte_limit: int = 2**31) -> Float[Array, "... D D"]:
        """The matrix itself.

        Raises:
            ValueError: if it takes more than `byte_limit` bytes.
        """
        acc = jnp.promote_types(jnp.result_type(self.left, self.right), jnp.float32)
        size = prod(self.shape) * acc.itemsize
        if size > byte_limit:
            must = f"at least the {size} bytes of {list(self.shape)}"
            do = "select fewer, or raise it"
            raise ValueError(expected("byte_limit", must, byte_limit, do))
        return contract("...DK,...KM->...DM", self.left, self.right)

    def __getitem__(self, index: Any) -> "Factored":
        """Some of the matrices: an index into the axes before `D`."""
        axes = self.left.shape[:-2]
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(index)):
            # JAX would clamp a wrong index; numpy raises, on a view that takes no memory.
            try:
                np.broadcast_to(np.zeros((), bool), axes)[index]
            except IndexError:
                do = "only axes before D and K can be indexed"
                raise IndexError(expected("index", f"within {list(axes)}", index, do)) from None
        return jax.tree.map(lambda factor: factor[index], self)

    def __matmul__(self, other: "Factored") -> "Factored":
        """The product of two, factored again, with the smaller K of the two."""
        if not isinstance(other, Factored):
            do = "multiply an array by `left` and `right` in turn"
            raise TypeError(expected("other", "Factored", type(other).__name__, do))
        if self.shape[-1] != other.shape[-2]:
            do = "both must be of one width"
            got = f"{list(self.shape)} @ {list(other.shape)}"
            raise ValueError(expected("other", f"of {self.shape[-1]} rows", got, do))
        # The K x M matrix between the outer factors joins the one that leaves fewer columns.
        inner = contract("...KD,...DM->...KM", self.right, other.left)
        if inner.shape[-2] <= inner.shape[-1]:
            left, right = self.left, contract("...KM,...MD->...KD", inner, other.right)
        else:
            left, right = contract("...DK,...KM->...DM", self.left, inner), other.right
        axes = inner.shape[:-2]
        return Factored(
            left=jnp.broadcast_to(left, (*axes, *left.shape[-2:])),
            right=jnp.broadcast_to(right, (*axes, *right.shape[-2:])),
        )

    def _between(self) -> tuple[tuple[Array, Array], Array]:
        """Orthonormal bases of columns and rows, and the matrix between them, `[...,K,K]`.

        The small matrix has the singular values of the large one.
        """
        acc = jnp.promote_types(jnp.result_type(self.left, self.right), jnp.float32)
        columns, left = jnp.linalg.qr(self.left.astype(acc))
        rows, right = jnp.linalg.qr(jnp.swapaxes(self.right, -1, -2).astype(acc))
        return (columns, rows), contract("...MK,...NK->...MN", left, right)

    def _need_square(self) -> None:
        if self.shape[-1] != self.shape[-2]:
            do = "leave out the row of biases"
            got = f"{list(self.shape[-2:])}"
            raise ValueError(expected("matrix", "square to have eigenvalues", got, do))


def eigenvalues(core: Float[Array, "... K K"]) -> Complex[np.ndarray, "... K"]:
    """The eigenvalues of many matrices, in float64 on the host."""
    if isinstance(core, Tracer):
        do = "call it outside of jit, vmap and grad: eigenvalues are computed on the host"
        raise TypeError(expected("matrix", "made of numbers", "a traced array", do))
    # Eigenvalues of nonsymmetric matrices are sensitive to rounding: float64 whatever the model's.
    return np.linalg.eigvals(np.asarray(core, np.float64))
