"""Gradients at the input: saliency, gradient times input, and SmoothGrad's mean over noise."""

from functools import partial

import jax
import jax.numpy as jnp

from arrakis_jax.attribution.inputs import Inputs, evenly, weighted_sum
from arrakis_jax.attribution.residual_gradients import tapped_gradients
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.numerics import norm as euclidean
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Transformer


def _reduced(
    gradient: Float[Array, "... D"], x: Float[Array, "... D"], norm: str
) -> Float[Array, "..."]:
    """A gradient as a number: one of its norms, or its product with where it was taken."""
    if norm == "l2":
        return euclidean(gradient)
    return (jnp.abs(gradient) if norm == "l1" else gradient * x).sum(-1)


@compiled("norm")
def at_input(model, tokens, mask, target, *, norm):
    """Saliency and gradient times input, at the embeddings and at every layer."""
    inputs = Inputs.of(model, tokens, mask, target)
    x_BTD = inputs.e_BTD + inputs.added_BTD
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
def smooth_grad(model, tokens, mask, target, *, norm, samples, noise, seed, step_batch):
    """The mean gradient over embeddings with Gaussian noise."""
    inputs = Inputs.of(model, tokens, mask, target)
    acc, (length, width) = model.config.acc, inputs.e_BTD.shape[1:]
    sigma = noise * table_std(model)

    def draw(sample: Array, position: Array) -> Float[Array, " D"]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), sample), position)
        return jax.random.normal(key, (width,), acc)

    def gradient(sample: Array) -> Float[Array, "B T D"]:
        noise_TD = jax.vmap(partial(draw, sample))(jnp.arange(length))
        noise_BTD = jnp.where(inputs.padding.real[..., None], noise_TD[inputs.padding.rank], 0)
        return inputs.gradient(inputs.e_BTD + sigma * noise_BTD)

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

    tokens = jnp.arange(model.config.vocab_size)
    mean_V, var_V = jax.lax.map(moments, tokens, batch_size=1024)
    return jnp.sqrt(var_V.mean() + mean_V.var())
