"""The k largest of many values, by absolute value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import checked_count


class Top(NamedTuple):
    """The largest terms, by absolute value: `value [k,...]`, and `index [k,...]` in the labels."""

    value: Array
    index: Array


def top(values: Float[Array, "C ..."], k: int) -> Top:
    """The k of C values that are largest in absolute value."""
    checked_count("k", k, values.shape[0])
    values = jnp.moveaxis(values, 0, -1)
    index = jax.lax.top_k(jnp.abs(values), k)[1]
    value = jnp.take_along_axis(values, index, -1)
    return Top(jnp.moveaxis(value, -1, 0), jnp.moveaxis(index, -1, 0))
