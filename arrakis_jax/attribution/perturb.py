"""What the target loses without a token: its embedding replaced, or its values zeroed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.attribution.inputs import Inputs, evenly
from arrakis_jax.attribution.result import Attribution
from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.forward.run import compiled


@compiled("step_batch")
def occlusion(model, tokens, mask, target, *, baseline, step_batch):
    """The target minus the target with each token's embedding replaced by the baseline's."""
    inputs = Inputs.of(model, tokens, mask, target)
    b_BTD = inputs.baseline(baseline)

    def without(at_T: Bool[Array, " T"]) -> Float[Array, " B"]:
        return inputs.value(jnp.where(at_T[None, :, None], b_BTD, inputs.e_BTD))

    return _lost(inputs, without, step_batch)


@compiled("step_batch")
def value_zeroing(model, tokens, mask, target, *, step_batch):
    """The target minus the target with each token's values zeroed in every layer."""
    inputs = Inputs.of(model, tokens, mask, target)

    def without(at_T: Bool[Array, " T"]) -> Float[Array, " B"]:
        def zero(site: str, layer: Any, value: Array) -> Array:
            return jnp.where(at_T[None, :, None, None], 0, value) if site == "v" else value

        return inputs.value(inputs.e_BTD, edits=(zero,))

    return _lost(inputs, without, step_batch)


def _lost(inputs: Inputs, without: Callable[[Array], Array], step_batch: int) -> Attribution:
    """The target minus the target without each column, `step_batch` columns at once."""
    length = inputs.ids.shape[1]
    # Column -1, of which there is none, is the run with everything; so are those past the end.
    size = evenly(length + 1, step_batch)
    columns = jnp.arange(-1, length + -(length + 1) % size)
    values_NB = jax.lax.map(lambda t: without(jnp.arange(length) == t), columns, batch_size=size)
    whole = values_NB[0]
    return inputs.result(whole[:, None] - values_NB[1 : length + 1].T, whole)
