"""One block of the decoder, and with its layers stacked, all of them: the place of the sites."""

from flax import nnx

from arrakis_jax.axes import Array, Int
from arrakis_jax.config import ModelConfig
from arrakis_jax.nn.attention import Attention
from arrakis_jax.nn.mlp import MLP
from arrakis_jax.nn.moe import MoE
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.where import Where


class Block(nnx.Module):
    """One layer; with `stack=(L,)` every parameter has a leading layer axis.

    `norm_attn` and `norm_mlp` are what attention and MLP read through, or norms of the stream
    itself; `norm_attn_out` and `norm_mlp_out` are what they write through. See `norm_placement`
    and `parallel` in ModelConfig.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        stack: tuple[int, ...] = (),
        *,
        moe: bool = False,
    ):
        self.config = config
        normed = config.norm is not None
        reads = normed and config.norm_placement != "post"
        writes = normed and config.norm_placement in ("post", "both")
        has_mlp = config.has_mlp(moe)
        self.norm_attn = Norm(config, stack) if reads else None
        self.attn = Attention(config, rngs, stack)
        self.norm_attn_out = Norm(config, stack) if writes else None
        own = reads and has_mlp and not config.shared_norm
        self.norm_mlp = Norm(config, stack) if own else None
        self.mlp = MLP(config, rngs, stack) if has_mlp and not moe else None
        self.moe = MoE(config, rngs, stack) if moe else None
        self.norm_mlp_out = Norm(config, stack) if writes and has_mlp else None

    def __call__(self, x_BTD: Array, where: Where, layer: Int[Array, ""], site: Sites) -> Array:
        """The stream after the block, from the stream before it."""
        place, dtype = self.config.norm_placement, x_BTD.dtype
        x_BTD = site("resid_pre", x_BTD)
        y_BTD = x_BTD if place == "stream_after" else self._norm("attn", x_BTD, site)
        if self.config.parallel:
            attn_BTD = self._attn(y_BTD, where, layer, site)
            y_BTD = y_BTD if self.config.shared_norm else self._norm("mlp", x_BTD, site)
            x_BTD = x_BTD + attn_BTD
        else:
            x_BTD = y_BTD if place == "stream_before" else x_BTD
            x_BTD = x_BTD + self._attn(y_BTD, where, layer, site)
            if place == "stream_after":
                x_BTD = self._norm("attn", x_BTD, site)
            x_BTD = site("resid_mid", x_BTD.astype(dtype))
            y_BTD = x_BTD if place == "stream_after" else self._norm("mlp", x_BTD, site)
            x_BTD = y_BTD if place == "stream_before" else x_BTD
        if self.mlp is not None or self.moe is not None:
            x_BTD = x_BTD + self._mlp(y_BTD, site)
            if place == "stream_after":
                x_BTD = self._norm("mlp", x_BTD, site)
        return site("resid_post", x_BTD.astype(dtype))

    def _attn(self, y_BTD: Array, where: Where, layer: Int[Array, ""], site: Sites) -> Array:
        """What attention writes."""
        return self._write("attn", self.attn(y_BTD, where, layer, site), site)

    def _mlp(self, y_BTD: Array, site: Sites) -> Array:
        """What the MLP, or the experts, write."""
        module = self.moe if self.mlp is None else self.mlp
        assert module is not None
        return self._write("mlp", module(y_BTD, site), site)

    def _write(self, what: str, out_BTD: Array, site: Sites) -> Array:
        out_BTD = self._norm(f"{what}_out", out_BTD, site)
        scale = self.config.residual_scale
        return site(f"{what}_out", out_BTD if scale == 1 else out_BTD * scale)

    def _norm(self, what: str, x_BTD: Array, site: Sites) -> Array:
        norm: Norm | None = getattr(self, f"norm_{what}")
        return x_BTD if norm is None else norm(x_BTD, site, f"norm_{what}_scale")
