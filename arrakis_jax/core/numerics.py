"""Contractions and norms of the analysis: at least float32, at full precision."""

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float


def contract(spec: str, *operands: Array) -> Array:
    """`jnp.einsum` in at least float32, for operands of any dtype, at the highest precision."""
    acc = jnp.promote_types(jnp.result_type(*operands), jnp.float32)
    operands = tuple(x.astype(acc) for x in operands)
    return jnp.einsum(spec, *operands, precision="highest", preferred_element_type=acc)


def norm(x: Float[Array, "... D"]) -> Float[Array, "..."]:
    """Euclidean norm over the last axis, with gradient zero (not NaN) at zero."""
    return root(jnp.sum(jnp.square(x), -1))


def root(square: Array) -> Array:
    """The square root, with gradient zero (not NaN) at zero."""
    # The inner `where` keeps the gradient finite: that of a root at zero is infinite, and the outer
    # one would multiply it by zero, which is NaN. NaN is not equal to zero, and stays.
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def ratio(a: Array | float, b: Array) -> Array:
    """`a / b`, and 0 where `b` is zero."""
    # Divided by one there, so that the gradient is finite too.
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
