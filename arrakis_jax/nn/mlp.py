"""The MLP, plain or gated."""

import jax
import jax.numpy as jnp
from flax import nnx

from arrakis_jax.core.axes import Array
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.linear import affine, constant, weight, writers
from arrakis_jax.nn.site import Sites

ACTIVATION = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    # As in BLOOM's own code, which rounds sqrt(2 / pi): in float64 it differs from "gelu_tanh".
    "gelu_bloom": lambda x: 0.5 * x * (1 + jnp.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}


class MLP(nnx.Module):
    """`out = a w_out + b_out`, `a = act(x w_gate + b_gate) * (x w_in + b_in)` or `act(x w_in)`."""

    def __init__(
        self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...], width: int | None = None
    ):
        d, f = config.d_model, config.d_mlp if width is None else width
        self.config = config
        self.w_in = weight(rngs, (*stack, d, f), d, config)
        self.w_gate = weight(rngs, (*stack, d, f), d, config) if config.gated else None
        self.w_out = weight(rngs, (*stack, f, d), writers(config) * f, config)
        bias = config.mlp_bias
        self.b_in = constant((*stack, f), 0.0, config) if bias else None
        self.b_gate = constant((*stack, f), 0.0, config) if bias and config.gated else None
        self.b_out = constant((*stack, d), 0.0, config) if bias else None

    def __call__(self, x_BTD: Array, site: Sites, name: str = "mlp_act") -> Array:
        """The sum of the MLP's units and its bias, `[B,T,D]`. Padding is not masked yet."""
        cfg, gate_BTF = self.config, None
        hidden_BTF = affine("BTD,DF->BTF", x_BTD, self.w_in, self.b_in, cfg)
        if self.w_gate is not None:
            gate_BTF = affine("BTD,DF->BTF", x_BTD, self.w_gate, self.b_gate, cfg)
        # Cast to the dtype of the product below, so that the record is exactly what it sums.
        hidden_BTF = site(name, activated(hidden_BTF, gate_BTF, cfg).astype(cfg.operands))
        return affine("BTF,FD->BTD", hidden_BTF, self.w_out, self.b_out, cfg)


def activated(hidden: Array, gate: Array | None, config: ModelConfig) -> Array:
    """The activations that multiply `w_out`, from `x w_in` and, in gated MLPs, `x w_gate`."""
    act, limit = ACTIVATION[config.activation], config.mlp_limit
    if gate is None:
        return act(hidden)
    if limit is not None:
        # The gate has no lower limit: its activation vanishes there by itself.
        gate, hidden = jnp.minimum(gate, limit), jnp.clip(hidden, -limit, limit)
    return act(gate) * (hidden + config.up_offset if config.up_offset else hidden)
