"""LayerNorm and RMSNorm, in two passes and at least float32, with their divisor as a site."""

import jax.numpy as jnp
from flax import nnx

from arrakis_jax.axes import Array, over
from arrakis_jax.config import ModelConfig
from arrakis_jax.nn.linear import constant
from arrakis_jax.nn.site import Sites


class Norm(nnx.Module):
    """`y = w * (x - mean(x)) / s + b` (LayerNorm) or `y = w * x / s` (RMSNorm).

    `s = sqrt(var(x) + eps)` with the biased variance, or `s = sqrt(mean(x^2) + eps)`.
    """

    def __init__(self, config: ModelConfig, stack: tuple[int, ...]):
        self.config = config
        self.w = constant((*stack, config.d_model), 1.0, config)
        centred = config.norm == "layernorm"
        self.b = constant((*stack, config.d_model), 0.0, config) if centred else None

    def __call__(self, x_BTD: Array, site: Sites, name: str) -> Array:
        """The normed stream; `name` is the site of the divisor."""
        x_BTD = self.centre(x_BTD.astype(self.config.acc))
        square_BT = jnp.mean(jnp.square(x_BTD), -1) + (self.config.norm_eps or 0.0)
        # One at padding before the root too: its slope at zero is infinite.
        s_BT = site(name, jnp.sqrt(site.at_real(square_BT, at_padding=1.0)), at_padding=1.0)
        y_BTD = x_BTD / s_BT[..., None] * over(self.w[...].astype(self.config.acc), x_BTD)
        return y_BTD if self.b is None else y_BTD + over(self.b[...].astype(y_BTD.dtype), y_BTD)

    def centre(self, x: Array) -> Array:
        """`x` minus its mean (LayerNorm), or `x` (RMSNorm)."""
        return x - jnp.mean(x, -1, keepdims=True) if self.config.norm == "layernorm" else x


def make_norm(config: ModelConfig, stack: tuple[int, ...] = ()) -> Norm | None:
    """The config's norm, or None for a model without."""
    return None if config.norm is None else Norm(config, stack)
