"""The k largest of many values, by absolute value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.checks import checked_count


class Top(NamedTuple):
    """The largest of C values by absolute value: `value [k,...]`, and `index [k,...]` along C."""

    value: Array
    index: Array


def top(
    values: Float[Array, "C ..."],
    k: int,
    *,
    among: Bool[Array, "C ..."] | None = None,
    most: int | None = None,
) -> Top:
    """The k of C values that are largest in absolute value, in descending order.

    Args:
        values: `[C,...]`; the other axes are ranked separately.
        k: how many.
        among: `[C]` or `[C,...]`, which values take part; None for all. If fewer than k do, the
            others follow.
        most: the largest k that is accepted; None for C.

    Raises:
        ValueError: unless k is an int in [1, most].
    """
    checked_count("k", k, values.shape[0] if most is None else most)
    size = jnp.abs(values)
    if among is not None:
        among = jnp.asarray(among).reshape(among.shape + (1,) * (values.ndim - among.ndim))
        size = jnp.where(among, size, -1)
    # `top_k` ranks along the last axis.
    index = jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(size, 0, -1), k)[1], -1, 0)
    return Top(jnp.take_along_axis(values, index, 0), index)
