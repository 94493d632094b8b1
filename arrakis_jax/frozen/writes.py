"""How an output of attention or the MLP reaches the stream, with all scales frozen."""

from collections.abc import Callable

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.norm import Norm
from arrakis_jax.stream.residuals import ResidualStream


def written(
    config: ModelConfig, stream: ResidualStream, norm: Norm | None, what: str
) -> tuple[Callable[[Array], Array], Float[Array, "B T"]]:
    """The linear map from an output of attention ("attn") or the MLP ("mlp") to the stream.

    It is the norm of the output, its scale frozen, times the model's factor. The first result maps
    directions `[...,D]`; the second multiplies them at each position.
    """
    # The scale has positions and weights have none, so the two stay apart.
    share = jnp.full(stream.mask.shape, config.residual_scale, config.acc)
    if norm is not None:
        share = share / getattr(stream, f"norm_{what}_out_scale")

    def through(w: Array) -> Array:
        w = w.astype(config.acc)
        return w if norm is None else norm.linear(w)

    return through, share
