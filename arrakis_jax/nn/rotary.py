"""Rotary position embedding in the half-split convention, with Llama 3.1's scaling.

Su et al. 2021, RoFormer; the scaling as in Hugging Face's modeling_rope_utils.
"""

import jax.numpy as jnp
import numpy as np

from arrakis_jax.axes import Array, Float, Int, over
from arrakis_jax.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """`[K/2]`, radians per token of each rotated pair."""
    assert config.rope_theta is not None
    frequency = config.rope_theta ** (-np.arange(0, config.d_head, 2) / config.d_head)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_positions * frequency / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else 1.0 * (turns > low)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotation(
    config: ModelConfig, position_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K2"], Float[Array, "B T K2"]]:
    """Cosines and sines of every position's angles, in at least float32."""
    frequency = jnp.asarray(frequencies(config), config.acc)
    angle = position_BT[..., None].astype(config.acc)
    angle = angle * over(frequency, angle)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: Float[Array, "B T H K"], cos: Array, sin: Array) -> Float[Array, "B T H K"]:
    """Rotates the pairs (i, i + K/2) of the last axis."""
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
