"""Many evaluations of one function, some at a time: memory is that of one chunk."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.numerics import contract


def evenly(n: int, most: int) -> int:
    """The size of each of the fewest batches of at most `most` that hold n."""
    # 9 of at most 8 are 5 and 4, not 8 and 1: the last batch is filled up with little waste.
    return -(-n // -(-n // most))


def in_chunks(function: Callable[[Array], Array], n: int, most: int) -> Float[Array, "N ..."]:
    """`function(0)` to `function(n - 1)`, at most `most` at a time, in chunks of equal size."""
    size = evenly(n, most)
    # Numbers from n on fill up the last chunk, and are cut off.
    index = jnp.arange(n + -n % size).reshape(-1, size)
    values = jax.lax.map(jax.vmap(function), index)
    return values.reshape(-1, *values.shape[2:])[:n]


def weighted_sum(
    function: Callable[[Array], Array],
    nodes: Array | np.ndarray,
    weights: Array,
    count: int | Array,
    size: int,
) -> Array:
    """The sum of `weight * function(node)` over the first `count` nodes, `size` at once.

    Nodes after those have weight zero. With an int `count` it can be differentiated in reverse.
    """
    # A loop and no map, so that only one chunk's gradients are held, and `count` may be traced.
    short = -len(nodes) % size
    nodes = jnp.pad(jnp.asarray(nodes), (0, short), mode="edge")
    weights = jnp.pad(weights, (0, short))

    def add(i: Array, total: Array) -> Array:
        node, weight = (jax.lax.dynamic_slice_in_dim(x, i * size, size) for x in (nodes, weights))
        return total + contract("N,N...->...", weight, jax.vmap(function)(node))

    shape = jax.eval_shape(function, nodes[0])
    return jax.lax.fori_loop(0, -(-count // size), add, jnp.zeros(shape.shape, shape.dtype))
