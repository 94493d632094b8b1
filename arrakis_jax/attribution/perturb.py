"""How much the target falls without a token: its embedding replaced, or its values zeroed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from arrakis_jax.attribution.chunks import in_chunks
from arrakis_jax.attribution.inputs import Inputs, checked_baseline
from arrakis_jax.attribution.method import FeatureMethod, check_whole
from arrakis_jax.attribution.result import Attribution
from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target
from arrakis_jax.nn.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Occlusion(FeatureMethod):
    """The loss with a baseline in a token's place, for `feature_attribution(method=...)`.

    Attributes:
        baseline: "mean" (None), "zero", a token id, `[B,T]` ids, or embeddings.
        step_batch: how many tokens are replaced at once at most.
    """

    name: ClassVar[str] = "occlusion"
    baseline: str | int | Array | None = None
    step_batch: int = 1

    def __post_init__(self) -> None:
        check_whole("step_batch", self.step_batch)

    def attribute(self, model, tokens, mask, target, *, check):  # noqa: D102
        baseline = checked_baseline(model.config, self.baseline, tokens, mask, check=check)
        baseline = None if baseline is None else jnp.asarray(baseline)
        step_batch = int(self.step_batch)
        return _occlusion(model, tokens, mask, target, baseline, step_batch=step_batch)


@dataclass(frozen=True, kw_only=True)
class ValueZeroing(FeatureMethod):
    """The loss with a token's values zeroed, for `feature_attribution(method=...)`.

    Attributes:
        step_batch: how many tokens are zeroed at once at most.
    """

    name: ClassVar[str] = "value_zeroing"
    step_batch: int = 1

    def __post_init__(self) -> None:
        check_whole("step_batch", self.step_batch)

    def attribute(self, model, tokens, mask, target, *, check):  # noqa: D102
        return _value_zeroing(model, tokens, mask, target, step_batch=int(self.step_batch))


@compiled("step_batch")
def _occlusion(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    target: Target,
    baseline: Array | None,
    *,
    step_batch: int,
) -> Attribution:
    """The target minus the target with each token's embedding replaced by the baseline's."""
    inputs = Inputs.of(model, tokens, mask, target)
    b_BTD = inputs.baseline(baseline)

    def without(at_T: Bool[Array, " T"]) -> Float[Array, " B"]:
        return inputs.value(jnp.where(at_T[None, :, None], b_BTD, inputs.e_BTD))

    return _lost(inputs, without, step_batch)


@compiled("step_batch")
def _value_zeroing(
    model: Transformer, tokens: Array, mask: Array | None, target: Target, *, step_batch: int
) -> Attribution:
    """The target minus the target with each token's values zeroed in every layer."""
    inputs = Inputs.of(model, tokens, mask, target)

    def without(at_T: Bool[Array, " T"]) -> Float[Array, " B"]:
        # Values and not keys: attention still goes to the token, and finds nothing there.
        def zero(site: str, layer: Any, value: Array) -> Array:
            return jnp.where(at_T[None, :, None, None], 0, value) if site == "v" else value

        return inputs.value(inputs.e_BTD, edits=(zero,))

    return _lost(inputs, without, step_batch)


def _lost(inputs: Inputs, without: Callable[[Array], Array], step_batch: int) -> Attribution:
    """The target minus the target without each column, `step_batch` columns at once."""
    length = inputs.ids.shape[1]
    # Column -1 is no token's, so the first run keeps everything.
    columns = jnp.arange(length)
    values_NB = in_chunks(lambda i: without(columns == i - 1), length + 1, step_batch)
    whole = values_NB[0]
    return inputs.result(whole[:, None] - values_NB[1:].T, whole)
