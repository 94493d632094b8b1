"""Terms that are values, laid out by layer."""

import jax.numpy as jnp
import numpy as np

from arrakis_jax.decomposition.logit_attribution import LogitAttribution
from arrakis_jax.results.labels import Kind, Labels, Segment


def test_by_layer_where_segments_have_several_layers():
    heads, mlp = Kind("head", range(3)), Kind("mlp")
    labels = Labels(("embed",), (Segment((0, 1), (heads,)), Segment((2, 3), (heads, mlp))))
    terms, of_row = jnp.arange(15.0)[:, None], jnp.zeros(1)
    found = LogitAttribution(
        terms=terms, constant=of_row, logit=of_row, rest=of_row, gap=of_row, labels=labels
    )
    want = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [11, 12, 13]]
    np.testing.assert_array_equal(found.by_layer("head")[..., 0], want)
    np.testing.assert_array_equal(found.by_layer("mlp")[:, 0], [10, 14])
