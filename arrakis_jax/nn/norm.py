"""LayerNorm and RMSNorm, in two passes and at least float32, with their divisor as a site."""

import jax.numpy as jnp
from flax import nnx

from arrakis_jax.core.axes import Array, over
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.linear import constant
from arrakis_jax.nn.site import Sites


class Norm(nnx.Module):
    """`y = g * (x - mean(x)) / s + b` (LayerNorm) or `y = g * x / s` (RMSNorm), `g = w + offset`.

    `s = sqrt(var(x) + eps)` with the biased variance, or `s = sqrt(mean(x^2) + eps)`.
    """

    def __init__(
        self,
        config: ModelConfig,
        stack: tuple[int, ...] = (),
        *,
        shape: tuple[int, ...] | None = None,
        over_last: int = 1,
        bias: bool = True,
    ):
        """A norm of the stream, or with `shape` gains, of that many last axes of something else."""
        self.config = config
        self.over_last = over_last
        shape = (*stack, *((config.d_model,) if shape is None else shape))
        initial = 1.0 - config.norm_offset
        self.w = constant(shape, initial, config) if config.norm_gain else None
        has_bias = config.norm == "layernorm" and config.norm_bias and bias
        self.b = constant(shape, 0.0, config) if has_bias else None

    def __call__(self, x: Array, site: Sites, name: str) -> Array:
        """The normed value, whose second axis is T; `name` is the site of the divisor."""
        x = self.centre(x.astype(self.config.acc))
        square = jnp.mean(jnp.square(x), self._axes) + (self.config.norm_eps or 0.0)
        # One at padding before the root too: its slope at zero is infinite.
        s = site(name, jnp.sqrt(site.at_real(square, at_padding=1.0)), at_padding=1.0)
        y = self.gained(x / jnp.expand_dims(s, self._axes))
        return y if self.b is None else y + over(self.b[...].astype(y.dtype), y)

    def linear(self, x: Array) -> Array:
        """`g * (x - mean(x))`, or `g * x`: the norm without bias, times its scale.

        With the scale held as it was, the norm is this linear map of any part of its input.
        """
        return self.gained(self.centre(x))

    def transposed(self, u: Array) -> Array:
        """The direction that reads the norm's input as `u` reads `linear` of it.

        `linear(x) . u = x . transposed(u)`. Centring is symmetric, so only the order changes.
        """
        return self.centre(self.gained(u))

    def centre(self, x: Array) -> Array:
        """`x` minus its mean (LayerNorm), or `x` (RMSNorm)."""
        if self.config.norm == "rmsnorm":
            return x
        return x - jnp.mean(x, self._axes, keepdims=True)

    def gained(self, x: Array) -> Array:
        """`x` times the gain."""
        return x if self.gain is None else x * over(self.gain, x)

    @property
    def gain(self) -> Array | None:
        """What the normed value is multiplied by; None for a norm without a gain."""
        if self.w is None:
            return None
        return self.w[...].astype(self.config.acc) + self.config.norm_offset

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.over_last, 0))
