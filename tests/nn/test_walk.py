"""The walk over the layers: their order, their parameters and their rows, in any segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax.nn.walk import (
    PerSegment,
    all_at_once,
    at_layer,
    rows_of,
    segment_layers,
    walk,
    walk_from,
)
from tests.models import model

MODELS = ("llama", "mixed")  # one segment; experts in some layers, which makes several


def first_gain(block):
    return block.norm_attn.w[0]


def gains(m):
    return [float(w) for blocks, _ in m.stacks() for w in blocks.norm_attn.w[...][:, 0]]


@pytest.mark.parametrize("variant", MODELS)
@pytest.mark.parametrize("layers", [None, (0,), (1, 2), (0, 2)])
@pytest.mark.parametrize("reverse", [False, True])
def test_each_layer_is_met_once_in_order_with_its_row(variant, layers, reverse):
    m = model(variant)
    wanted = list(range(m.config.n_layers)) if layers is None else list(layers)
    xs = 10.0 * jnp.array(wanted)

    def step(state, place, x):
        state = state * 8 + place.index + 1  # the order, in base 8
        return state, (place.index, first_gain(place.block), x, state)

    walked = walk(m, step, jnp.zeros((), int), xs, layers=layers, reverse=reverse)
    index, gain, rows, states = walked.found
    assert index.tolist() == wanted
    assert np.allclose(gain, [gains(m)[layer] for layer in wanted])
    assert rows.tolist() == xs.tolist()
    order = wanted[::-1] if reverse else wanted
    assert int(walked.state) == sum((n + 1) * 8**i for i, n in enumerate(order[::-1]))
    assert int(states[0 if reverse else -1]) == int(walked.state)
    found = all_at_once(m, lambda place, x: (place.index, x), xs, layers=layers)
    assert np.concatenate([i for i, _ in found]).tolist() == wanted
    assert [tuple(i.tolist()) for i, _ in found] == segment_layers(m, layers)


def test_rows_that_differ_between_segments():
    m = model("mixed")
    segments = segment_layers(m)
    assert len(segments) > 1
    xs = PerSegment(tuple(jnp.full((len(own), i + 1), i) for i, own in enumerate(segments)))

    def step(state, place, x):
        assert x.shape == (place.segment + 1,)
        return state + x.sum(), None

    total = sum(len(own) * i * (i + 1) for i, own in enumerate(segments))
    assert int(walk(m, step, jnp.zeros((), int), xs).state) == total


@pytest.mark.parametrize("variant", MODELS)
def test_a_traced_layer(variant):
    """One program serves each start and each layer."""
    m = model(variant)

    @jax.jit
    def from_layer(start):
        return walk_from(m, lambda state, place: state * 8 + place.index + 1, 0 * start, start)

    @jax.jit
    def gain_of(layer):
        return at_layer(m, lambda block, layer, x: first_gain(block) + layer + x, layer, 2.0)

    n = m.config.n_layers
    for layer in range(n):
        rest = range(layer, n)
        assert int(from_layer(jnp.array(layer))) == sum((k + 1) * 8 ** (n - 1 - k) for k in rest)
        assert np.isclose(float(gain_of(jnp.array(layer))), gains(m)[layer] + layer + 2)
        assert np.isclose(
            float(at_layer(m, lambda block, _: first_gain(block), layer)), gains(m)[layer]
        )
    assert from_layer._cache_size() == gain_of._cache_size() == 1


def test_rows_are_slices_where_layers_follow_one_another():
    assert rows_of(range(4), range(4)) is None
    assert rows_of(range(4), (1, 2)) == slice(1, 3)
    assert rows_of((2, 3, 5), (3, 5)) == slice(1, 3)
    assert rows_of(range(4), (0, 2)).tolist() == [0, 2]
