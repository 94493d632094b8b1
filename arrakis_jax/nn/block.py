"""One block of the decoder, which calls the sites. Stacked parameters make it all blocks."""

import jax.numpy as jnp
from flax import nnx

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.attention import Attention
from arrakis_jax.nn.context import AttentionContext
from arrakis_jax.nn.mlp import MLP
from arrakis_jax.nn.moe import MoE
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.site import Sites


class Block(nnx.Module):
    """One layer. With `stack=(L,)` every parameter has a leading layer axis.

    Attention and MLP read through `norm_attn` and `norm_mlp`, or these two norm the stream itself.
    They write through `norm_attn_out` and `norm_mlp_out`. `norm_placement` and `parallel` in
    ModelConfig decide which.
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
        # norm_attn and norm_mlp stand on inputs or on the stream, norm_*_out on outputs.
        normed, writes = config.norm is not None, config.norms_outputs
        reads = normed and (config.norms_inputs or config.norms_stream)
        has_mlp = config.has_mlp(moe)
        self.norm_attn = Norm(config, stack) if reads else None
        self.attn = Attention(config, rngs, stack)
        self.norm_attn_out = Norm(config, stack) if writes else None
        # With a shared norm the MLP reads the output of `norm_attn`.
        mlp_norm = reads and has_mlp and not config.shared_norm
        self.norm_mlp = Norm(config, stack) if mlp_norm else None
        self.mlp = MLP(config, rngs, stack) if has_mlp and not moe else None
        self.moe = MoE(config, rngs, stack) if moe else None
        self.norm_mlp_out = Norm(config, stack) if writes and has_mlp else None

    def __call__(
        self, x_BTD: Array, context: AttentionContext, layer: Int[Array, ""], site: Sites
    ) -> Array:
        """The stream after the block, from the stream before it."""
        place, dtype = self.config.norm_placement, x_BTD.dtype
        x_BTD = site("resid_pre", x_BTD)
        y_BTD = x_BTD if place == "stream_after" else self._norm("attn", x_BTD, site)
        # x is the stream; y is the input of the next module.
        inputs = self.head_inputs(x_BTD, y_BTD, site)
        if self.config.parallel:
            # The MLP reads the stream from before attention, so attention is not added yet.
            attn_BTD = self.attn_write(inputs, context, layer, site)
            y_BTD = y_BTD if self.config.shared_norm else self._norm("mlp", x_BTD, site)
            y_BTD = self._mlp_input(x_BTD, y_BTD, site)
            x_BTD = x_BTD + attn_BTD
        else:
            x_BTD = y_BTD if place == "stream_before" else x_BTD
            x_BTD = x_BTD + self.attn_write(inputs, context, layer, site)
            if place == "stream_after":
                x_BTD = self._norm("attn", x_BTD, site)
            # The sum is in float32 or wider. A stream with a narrower dtype rounds it here.
            x_BTD = site("resid_mid", x_BTD.astype(dtype))
            y_BTD = x_BTD if place == "stream_after" else self._norm("mlp", x_BTD, site)
            y_BTD = self._mlp_input(x_BTD, y_BTD, site)
            x_BTD = y_BTD if place == "stream_before" else x_BTD
        if self.mlp is not None or self.moe is not None:
            x_BTD = x_BTD + self.mlp_write(y_BTD, site)
            if place == "stream_after":
                x_BTD = self._norm("mlp", x_BTD, site)
        return site("resid_post", x_BTD.astype(dtype))

    def head_inputs(self, x_BTD: Array, y_BTD: Array, site: Sites) -> tuple[Array, Array, Array]:
        """The inputs of queries, keys and values: `[B,T,D]` for all heads, or `[B,T,heads,D]`."""
        n_heads, n_kv = self.config.n_heads, self.config.n_kv_heads

        def of(name: str, n: int) -> Array:
            if not site.splits(name):
                return y_BTD
            # A copy of the stream for each head, so that an edit can change the input of one head.
            shape = (*x_BTD.shape[:2], n, x_BTD.shape[-1])
            return self.read("attn", site(name, jnp.broadcast_to(x_BTD[..., None, :], shape)), site)

        return of("q_in", n_heads), of("k_in", n_kv), of("v_in", n_kv)

    def _mlp_input(self, x_BTD: Array, y_BTD: Array, site: Sites) -> Array:
        """The input of the MLP."""
        has_mlp = self.mlp is not None or self.moe is not None
        if not (has_mlp and site.splits("mlp_in")):
            return y_BTD
        reader = "attn" if self.config.shared_norm else "mlp"
        return self.read(reader, site("mlp_in", x_BTD), site)

    def read(self, what: str, x: Array, site: Sites) -> Array:
        """The stream through the norm before "attn" or "mlp", if a norm stands there."""
        if self.config.norm_placement == "stream_after":
            return x
        # `unseen`: the block records this norm's scale already, for the stream itself.
        return self._norm(what, x, site.unseen)

    def attn_write(
        self,
        inputs: tuple[Array, Array, Array],
        context: AttentionContext,
        layer: Int[Array, ""],
        site: Sites,
    ) -> Array:
        """The output of attention as it is added to the stream, from its three inputs."""
        return self._write("attn", self.attn(inputs, context, layer, site), site)

    def mlp_write(self, y_BTD: Array, site: Sites) -> Array:
        """The output of the MLP or the experts as it is added to the stream."""
        module = self.moe if self.mlp is None else self.mlp
        assert module is not None
        return self._write("mlp", module(y_BTD, site), site)

    def _write(self, module: str, out_BTD: Array, site: Sites) -> Array:
        out_BTD = self._norm(f"{module}_out", out_BTD, site)
        scale = self.config.residual_scale
        # The site comes after norm and factor, so its record is exactly the change of the stream.
        return site(f"{module}_out", out_BTD if scale == 1 else out_BTD * scale)

    def _norm(self, name: str, x_BTD: Array, site: Sites) -> Array:
        norm: Norm | None = getattr(self, f"norm_{name}")
        return x_BTD if norm is None else norm(x_BTD, site, f"norm_{name}_scale")
