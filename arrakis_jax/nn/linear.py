"""Products with weights: the operands in the weights' dtype, the sums in at least float32."""

import jax.numpy as jnp
from flax import nnx

from arrakis_jax.axes import Array, over
from arrakis_jax.config import ModelConfig


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, config: ModelConfig) -> nnx.Param:
    """A weight drawn from a normal distribution with variance 1 / fan_in."""
    std = max(fan_in, 1) ** -0.5
    return nnx.Param(rngs.params.normal(shape, config.dtype) * jnp.asarray(std, config.dtype))


def writers(config: ModelConfig) -> int:
    """How many modules write to the stream: their weights start smaller by its root (GPT-2)."""
    return max(2 * config.n_layers, 1)


def constant(shape: tuple[int, ...], value: float, config: ModelConfig) -> nnx.Param:
    """A bias (0) or a norm's gain (1)."""
    return nnx.Param(jnp.full(shape, value, config.dtype))


def product(spec: str, *operands: Array, config: ModelConfig) -> Array:
    """`jnp.einsum` with operands in the model's dtype and the result in `config.acc`."""
    return jnp.einsum(
        spec,
        *(x.astype(config.dtype) for x in operands),
        precision=precision(config),
        preferred_element_type=config.acc,
    )


def affine(spec: str, x: Array, w: nnx.Param, b: nnx.Param | None, config: ModelConfig) -> Array:
    """`x w + b`, or `x w` where the model has no such bias."""
    y = product(spec, x, w[...], config=config)
    return y if b is None else y + over(b[...].astype(y.dtype), y)


def precision(config: ModelConfig) -> str | None:
    """The precision of products of float32 operands; other dtypes have only one."""
    return None if config.dtype == "bfloat16" else config.matmul_precision
