"""LayerNorm and RMSNorm, in two passes and at least float32. Their divisor is a site."""

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
        """A norm of the stream; with `shape` gains, of the `over_last` last axes of any array."""
        self.config = config
        self.over_last = over_last
        shape = (*stack, *((config.d_model,) if shape is None else shape))
        # The offset is added to w, so w starts where the gain is one.
        initial = 1.0 - config.norm_offset
        self.w = constant(shape, initial, config) if config.norm_gain else None
        has_bias = config.norm == "layernorm" and config.norm_bias and bias
        self.b = constant(shape, 0.0, config) if has_bias else None

    def __call__(self, x: Array, site: Sites, name: str) -> Array:
        """The normed value. Axis 1 of `x` is T; `name` is the site of the divisor."""
        # Centred first, and squared then: E[x^2] - E[x]^2 would lose digits to cancellation.
        x = self.centre(x.astype(self.config.acc))
        square = jnp.mean(jnp.square(x), self._axes) + (self.config.norm_eps or 0.0)
        # Padding gets 1 before the root as well as after it. The root's slope at zero is infinite,
        # and an infinite slope makes gradients NaN even where a `where` drops the value.
        s = site(name, jnp.sqrt(site.at_real(square, at_padding=1.0)), at_padding=1.0)
        y = self.gained(x / jnp.expand_dims(s, self._axes))
        return y if self.b is None else y + over(self.b[...].astype(y.dtype), y)

    def linear(self, x: Array) -> Array:
        """`g * (x - mean(x))`, or `g * x`: the norm without its bias, times its scale.

        With its scale frozen the norm is this linear map, divided by the scale, plus the bias.
        """
        return self.gained(self.centre(x))

    def transposed(self, u: Array) -> Array:
        """The direction that reads from `x` what `u` reads from `linear(x)`.

        `linear(x) . u = x . transposed(u)`. Centring is symmetric, so only the order changes.
        """
        return self.centre(self.gained(u))

    def centre(self, x: Array) -> Array:
        """`x` minus its mean in a LayerNorm, or `x` in an RMSNorm."""
        if self.config.norm == "rmsnorm":
            return x
        return x - jnp.mean(x, self._axes, keepdims=True)

    def gained(self, x: Array) -> Array:
        """`x` times the gain."""
        return x if self.gain is None else x * over(self.gain, x)

    @property
    def gain(self) -> Array | None:
        """The factor on the normed value; None for a norm without a gain."""
        if self.w is None:
            return None
        return self.w[...].astype(self.config.acc) + self.config.norm_offset

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.over_last, 0))
