"""Gradients at the input: saliency, gradient times input, and SmoothGrad's mean over noise."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from arrakis_jax.attribution.chunks import evenly, weighted_sum
from arrakis_jax.attribution.inputs import Inputs
from arrakis_jax.attribution.method import FeatureMethod, check_size, check_whole
from arrakis_jax.attribution.residual_gradients import tapped_gradients
from arrakis_jax.attribution.result import GRADIENT_NORMS, Attribution
from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import checked_choice, checked_seed
from arrakis_jax.core.numerics import norm as euclidean
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target
from arrakis_jax.nn.transformer import Transformer


def _reduced(
    gradient: Float[Array, "... D"], x: Float[Array, "... D"], norm: str
) -> Float[Array, "..."]:
    """A gradient as a number: a norm of it, or its product with the point x it was taken at."""
    if norm == "l2":
        return euclidean(gradient)
    return (jnp.abs(gradient) if norm == "l1" else gradient * x).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Saliency(FeatureMethod):
    """The norm of the target's gradient at each token, for `feature_attribution(method=...)`.

    Attributes:
        norm: "l2", "l1", or "signed", the gradient's product with the embedding.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom")
        >>> feature_attribution(model, tokens, 3, mask=mask, method=Saliency(norm="l1")).norm
        'l1'
    """

    name: ClassVar[str] = "saliency"
    norm: str = "l2"

    def __post_init__(self) -> None:
        checked_choice("norm", self.norm, tuple(GRADIENT_NORMS))

    def attribute(self, model, tokens, mask, target, *, check):  # noqa: D102
        return replace(_at_input(model, tokens, mask, target, norm=self.norm), norm=self.norm)


@dataclass(frozen=True, kw_only=True)
class GradTimesInput(FeatureMethod):
    """The gradient's product with the embedding, for `feature_attribution(method=...)`."""

    name: ClassVar[str] = "grad_x_input"

    def attribute(self, model, tokens, mask, target, *, check):  # noqa: D102
        return _at_input(model, tokens, mask, target, norm="signed")


@dataclass(frozen=True, kw_only=True)
class SmoothGrad(FeatureMethod):
    """The norm of the mean gradient over noisy embeddings, for `feature_attribution(method=...)`.

    Attributes:
        norm: "l2", "l1", or "signed", the gradient's product with the embedding.
        samples: how many gradients are averaged.
        noise: the noise's standard deviation, as a fraction of the embedding table's.
        seed: of the noise.
        step_batch: how many samples are run at once at most.
    """

    name: ClassVar[str] = "smooth_grad"
    norm: str = "l2"
    samples: int = 50
    noise: float | Array = 0.15
    seed: int | Array = 0
    step_batch: int = 1

    def __post_init__(self) -> None:
        checked_choice("norm", self.norm, tuple(GRADIENT_NORMS))
        check_whole("samples", self.samples)
        check_whole("step_batch", self.step_batch)
        checked_seed(self.seed)
        check_size("noise", self.noise)

    def attribute(self, model, tokens, mask, target, *, check):  # noqa: D102
        # Arrays, so that another noise or seed compiles nothing.
        noise, seed = jnp.asarray(self.noise, model.config.acc), checked_seed(self.seed)
        result = _smooth_grad(
            model, tokens, mask, target, noise, seed,
            norm=self.norm, samples=int(self.samples), step_batch=int(self.step_batch),
        )  # fmt: skip
        return replace(result, norm=self.norm)


@compiled("norm")
def _at_input(
    model: Transformer, tokens: Array, mask: Array | None, target: Target, *, norm: str
) -> Attribution:
    """Saliency and gradient times input, at the embeddings and at every layer."""
    inputs = Inputs.of(model, tokens, mask, target)
    x_BTD = inputs.e_BTD + inputs.added_BTD
    # Learned positions are added to the embedding, so a tap behind them has its gradient.
    value, gradients, stream = tapped_gradients(
        model, x_BTD, mask, target, ("embed", "resid_pre", "final"), ("resid_pre",)
    )
    layers = [
        _reduced(gradients["resid_pre"], stream.resid_pre, norm),
        _reduced(gradients["final"], stream.final, norm)[None],
    ]
    tokens_BT = _reduced(gradients["embed"], inputs.e_BTD, norm)
    return inputs.result(tokens_BT, value, layers=jnp.concatenate(layers))


@compiled("norm", "samples", "step_batch")
def _smooth_grad(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    target: Target,
    noise: Float[Array, ""],
    seed: Int[Array, ""],
    *,
    norm: str,
    samples: int,
    step_batch: int,
) -> Attribution:
    """The mean gradient over embeddings with Gaussian noise."""
    inputs = Inputs.of(model, tokens, mask, target)
    acc, (length, width) = model.config.acc, inputs.e_BTD.shape[1:]
    sigma = noise * table_std(model)

    # A token's noise depends on its position among real tokens, so that padding changes nothing.
    def draw(sample: Array, position: Array) -> Float[Array, " D"]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.normal(key, (width,), acc)

    def gradient(sample: Array) -> Float[Array, "B T D"]:
        noise_TD = jax.vmap(partial(draw, sample))(jnp.arange(length))
        noise_BTD = jnp.where(inputs.padding.real[..., None], noise_TD[inputs.padding.rank], 0)
        return inputs.gradient(inputs.e_BTD + sigma * noise_BTD)

    # Averaged before the norm, which would not let noise cancel.
    at_once = evenly(samples, step_batch)
    weights = jnp.full(samples, 1 / samples, acc)
    mean_BTD = weighted_sum(gradient, jnp.arange(samples), weights, samples, at_once)
    tokens_BT = _reduced(mean_BTD, inputs.e_BTD, norm)
    return inputs.result(tokens_BT, inputs.value(inputs.e_BTD))


def table_std(model: Transformer) -> Float[Array, ""]:
    """The standard deviation of all token embeddings' entries, as the stream holds them."""

    def moments(token: Array) -> tuple[Array, Array]:
        e = model.embed_tokens(token)
        return e.mean(), e.var()

    # In batches of tokens: the table in float32 would be a copy. The total variance is the mean of
    # the variances plus the variance of the means, since all tokens have D entries.
    tokens = jnp.arange(model.config.vocab_size)
    mean_V, var_V = jax.lax.map(moments, tokens, batch_size=1024)
    return jnp.sqrt(var_V.mean() + mean_V.var())
