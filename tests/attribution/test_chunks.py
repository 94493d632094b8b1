"""Chunks of evaluations: the same numbers in whatever chunks, and no more chunks than needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax.attribution.chunks import evenly, in_chunks, weighted_sum


@pytest.mark.parametrize("n, most, size", [(9, 8, 5), (8, 8, 8), (1, 8, 1), (7, 3, 3), (5, 1, 1)])
def test_chunks_are_equal_and_as_few_as_can_be(n, most, size):
    assert evenly(n, most) == size <= most
    assert -(-n // size) == -(-n // most)
    values = in_chunks(lambda i: jnp.stack([i, i**2]), n, most)
    np.testing.assert_array_equal(values, [(i, i**2) for i in range(n)])


def test_a_weighted_sum_takes_the_first_nodes_alone():
    nodes, weights = np.arange(1.0, 6.0), jnp.array([1.0, 2, 3, 0, 0])

    def total(scale, count, size=2):
        return weighted_sum(lambda x: scale * x, nodes, weights, count, size)

    assert total(2.0, 5) == total(2.0, 3) == 2 * (1 + 4 + 9)
    assert jax.jit(total)(2.0, 3) == 28  # a traced count
    assert jax.grad(total)(2.0, 3) == 14
