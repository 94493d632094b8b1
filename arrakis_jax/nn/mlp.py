"""The MLP: plain, or gated."""

import jax
from flax import nnx

from arrakis_jax.axes import Array
from arrakis_jax.config import ModelConfig
from arrakis_jax.nn.linear import affine, constant, weight, writers
from arrakis_jax.nn.site import Sites

ACTIVATION = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "identity": lambda x: x,
}


class MLP(nnx.Module):
    """`out = a w_out + b_out`, `a = act(x w_gate + b_gate) * (x w_in + b_in)` or `act(x w_in)`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]):
        d, f = config.d_model, config.d_mlp
        self.config = config
        self.w_in = weight(rngs, (*stack, d, f), d, config)
        self.w_gate = weight(rngs, (*stack, d, f), d, config) if config.gated else None
        self.w_out = weight(rngs, (*stack, f, d), writers(config) * f, config)
        bias = config.mlp_bias
        self.b_in = constant((*stack, f), 0.0, config) if bias else None
        self.b_gate = constant((*stack, f), 0.0, config) if bias and config.gated else None
        self.b_out = constant((*stack, d), 0.0, config) if bias else None

    def __call__(self, x_BTD: Array, site: Sites) -> Array:
        """What the MLP writes to the stream, `[B,T,D]`, before the mask of padding."""
        act = ACTIVATION[self.config.activation]
        hidden_BTF = affine("BTD,DF->BTF", x_BTD, self.w_in, self.b_in, self.config)
        if self.w_gate is None:
            hidden_BTF = act(hidden_BTF)
        else:
            hidden_BTF *= act(affine("BTD,DF->BTF", x_BTD, self.w_gate, self.b_gate, self.config))
        hidden_BTF = site("mlp_act", hidden_BTF.astype(self.config.dtype))
        return affine("BTF,FD->BTD", hidden_BTF, self.w_out, self.b_out, self.config)
