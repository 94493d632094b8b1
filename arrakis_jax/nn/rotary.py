"""Rotary position embedding: half-split or interleaved, partial, with every common scaling.

Source: Su et al. 2021, RoFormer. Hugging Face's modeling_rope_utils defines the scalings.
"""

import math

import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.config import ModelConfig, RopeScaling


def frequencies(
    theta: float, scaling: RopeScaling | None, d_rotary: int, length: Array | int = 0
) -> np.ndarray | Array:
    """`[K/2]`, radians per token of each rotated pair.

    Scalings that depend on the `length [B]` of each prompt give `[B,K/2]`.
    """
    # In float64, so that the frequencies are rounded only once: far positions multiply the error.
    exponent = np.arange(0, d_rotary, 2) / d_rotary
    frequency = theta**-exponent
    if scaling is None:
        return frequency
    factor, trained = scaling.factor or 1.0, scaling.original_max_positions or 1
    if scaling.kind == "linear":
        return frequency / factor
    # Each row has its own length, so that a prompt has the same numbers in any batch.
    length = jnp.asarray(length)[..., None]
    if scaling.kind == "dynamic":
        # The base grows with the length of the text: theta * growth ** (d / (d - 2)).
        growth = factor * jnp.maximum(length, trained) / trained - (factor - 1)
        power = -exponent * d_rotary / (d_rotary - 2)
        return over(jnp.asarray(frequency), growth) * growth ** over(jnp.asarray(power), growth)
    if scaling.kind == "longrope":
        short, long = (np.array(f) for f in (scaling.short_factor, scaling.long_factor))
        longer = length > trained
        return jnp.where(longer, *(over(jnp.asarray(frequency / f), longer) for f in (long, short)))
    if scaling.kind == "yarn":
        kept = 1 - _ramp(theta, scaling, d_rotary)
    else:
        # Llama 3 keeps frequencies that turn often in the trained context, divides slow ones by
        # the factor, and mixes both for the frequencies between.
        turns = trained * frequency / (2 * np.pi)
        low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 1.0
        kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else 1.0 * (turns > low)
    return frequency * (kept + (1 - kept) / factor)


def _ramp(theta: float, scaling: RopeScaling, d_rotary: int) -> np.ndarray:
    """YaRN's degree of interpolation of each frequency: 0 keeps it, 1 divides by the factor."""
    trained = scaling.original_max_positions or 1

    def dimension(turns: float | None) -> float:
        """The index, a real number, of the frequency that turns this often in that context."""
        per_turn = math.log(trained / ((turns or 1) * 2 * math.pi))
        return d_rotary * per_turn / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_rotary - 1)
    # Both ends may round to one index, which would divide by zero.
    width = high - low or 0.001
    return np.clip((np.arange(d_rotary // 2) - low) / width, 0, 1)


def rotation(
    config: ModelConfig,
    theta: float,
    scaling: RopeScaling | None,
    position_BT: Int[Array, "B T"],
    length_B: Int[Array, " B"],
) -> tuple[Float[Array, "B T K2"], Float[Array, "B T K2"]]:
    """The cosines and sines of all positions' angles, in at least float32."""
    frequency = frequencies(theta, scaling, config.d_rotary, length_B.astype(config.acc))
    frequency = jnp.asarray(frequency, config.acc)
    angle = position_BT[..., None].astype(config.acc)
    angle = angle * (over(frequency, angle) if frequency.ndim == 1 else frequency[..., None, :])
    # The factor scales queries and keys alike, so it counts twice in the scores, as in YaRN.
    factor = 1.0 if scaling is None else scaling.attention_factor
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x_BTHK: Float[Array, "B T H K"], cos: Array, sin: Array, *, interleaved: bool = False
) -> Float[Array, "B T H K"]:
    """Rotates the first 2n entries of K in pairs: (i, i + n), or (2i, 2i + 1) if interleaved."""
    n = cos.shape[-1]
    turned, rest = x_BTHK[..., : 2 * n], x_BTHK[..., 2 * n :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :n], turned[..., n:]
    cos, sin = cos[..., None, :], sin[..., None, :]
    a, b = a * cos - b * sin, b * cos + a * sin
    if interleaved:
        return jnp.concatenate([jnp.stack([a, b], -1).reshape(turned.shape), rest], -1)
    return jnp.concatenate([a, b, rest], -1)
