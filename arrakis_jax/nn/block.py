"""One block of the decoder, and with its layers stacked, all of them: the place of the sites."""

from flax import nnx

from arrakis_jax.axes import Array, Bool, Int
from arrakis_jax.config import ModelConfig
from arrakis_jax.nn.attention import Attention
from arrakis_jax.nn.mlp import MLP
from arrakis_jax.nn.norm import Norm, make_norm
from arrakis_jax.nn.site import Sites


class Block(nnx.Module):
    """A pre-norm sequential block; with `stack=(L,)` every parameter has a leading layer axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...] = ()):
        self.norm_attn = make_norm(config, stack)
        self.attn = Attention(config, rngs, stack)
        self.norm_mlp = make_norm(config, stack) if config.d_mlp else None
        self.mlp = MLP(config, rngs, stack) if config.d_mlp else None

    def __call__(
        self,
        x_BTD: Array,
        rotation: tuple[Array, Array] | None,
        allowed_BTS: Bool[Array, "B T S"],
        layer: Int[Array, ""],
        site: Sites,
    ) -> Array:
        """The stream after the block, from the stream before it."""
        x_BTD = site("resid_pre", x_BTD)
        y_BTD = _normed(self.norm_attn, x_BTD, site, "norm_attn_scale")
        attn_BTD = site("attn_out", self.attn(y_BTD, rotation, allowed_BTS, layer, site))
        x_BTD = site("resid_mid", (x_BTD + attn_BTD).astype(x_BTD.dtype))
        if self.mlp is not None:
            y_BTD = _normed(self.norm_mlp, x_BTD, site, "norm_mlp_scale")
            mlp_BTD = site("mlp_out", self.mlp(y_BTD, site))
            x_BTD = (x_BTD + mlp_BTD).astype(x_BTD.dtype)
        return site("resid_post", x_BTD)


def _normed(norm: Norm | None, x_BTD: Array, site: Sites, name: str) -> Array:
    return x_BTD if norm is None else norm(x_BTD, site, name)
