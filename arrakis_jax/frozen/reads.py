"""What reads a logit from the stream, with all scales frozen."""

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.numerics import contract
from arrakis_jax.nn.transformer import Transformer


def logit_reader(
    model: Transformer, targets: Array, against: Array | None
) -> tuple[Float[Array, "... D"], Float[Array, "..."]]:
    """What reads a logit, or a difference of two, from the normed stream, and its bias."""
    u, bias = model.unembedding(targets), model.unembedding_bias(targets)
    if against is not None:
        u, bias = u - model.unembedding(against), bias - model.unembedding_bias(against)
    return u, bias


def logit_direction(model: Transformer, u: Float[Array, "... D"]) -> tuple[Array, Array]:
    """The stream direction `r` and the constant with `norm(x) . u = x . r / s + constant`."""
    if model.norm_final is None:
        return u, jnp.zeros(u.shape[:-1], u.dtype)
    r = model.norm_final.centre(model.norm_final.gained(u))
    if model.norm_final.b is None:
        return r, jnp.zeros(u.shape[:-1], u.dtype)
    return r, contract("...D,D->...", u, model.norm_final.b[...])
