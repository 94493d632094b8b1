"""The k largest, against a sort of numpy's."""

import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax.results.ranking import top


def test_the_largest_of_every_column():
    values = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(np.float32)
    largest = top(jnp.asarray(values), 4)
    index = np.argsort(-abs(values), axis=0)[:4]
    np.testing.assert_array_equal(largest.index, index)
    np.testing.assert_array_equal(largest.value, np.take_along_axis(values, index, 0))


@pytest.mark.parametrize("rows", [(), (3,)])
def test_only_some_take_part(rows):
    values = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    among = np.random.default_rng(2).random((7, *rows)) < 0.6
    among[:4] = True
    masked = np.where(among.reshape(7, -1), abs(values), -1)
    index = np.argsort(-masked, axis=0)[:4]
    np.testing.assert_array_equal(top(jnp.asarray(values), 4, among=among).index, index)


def test_more_than_there_are():
    with pytest.raises(ValueError, match=r"`k` must be an int in \[1, 3\], got 4"):
        top(jnp.zeros((3, 2)), 4)
    with pytest.raises(ValueError, match=r"`k` must be an int in \[1, 2\], got 3"):
        top(jnp.zeros((3, 2)), 3, among=np.array([True, False, True]), most=2)
