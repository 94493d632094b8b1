"""Mixture of experts. Every token goes to its k experts; there is no capacity limit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.linear import affine, constant, product, weight, writers
from arrakis_jax.nn.mlp import MLP, activated
from arrakis_jax.nn.site import Sites
from arrakis_jax.results.record import ABSENT
from arrakis_jax.stream.residuals import Routing


class MoE(nnx.Module):
    """`out = sum_e g_e (a_e w_out[e] + b_out[e])` over a token's k experts, plus a shared expert.

    `g` are the k largest of `softmax(x w_router + b_router)`. The config can divide them by their
    sum. `a_e` is the hidden layer of an `MLP`. The shared expert is an MLP for every token, and is
    multiplied by `sigmoid(x . w_shared_gate)`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...]):
        d, e, f = config.d_model, config.n_experts, config.d_expert
        self.config = config
        self.w_router = weight(rngs, (*stack, d, e), d, config)
        self.b_router = constant((*stack, e), 0.0, config) if config.router_bias else None
        self.w_in = weight(rngs, (*stack, e, d, f), d, config)
        self.w_gate = weight(rngs, (*stack, e, d, f), d, config) if config.gated else None
        self.w_out = weight(rngs, (*stack, e, f, d), writers(config) * f, config)
        bias = config.mlp_bias
        self.b_in = constant((*stack, e, f), 0.0, config) if bias else None
        self.b_gate = constant((*stack, e, f), 0.0, config) if bias and config.gated else None
        self.b_out = constant((*stack, e, d), 0.0, config) if bias else None
        shared = config.d_shared_expert
        self.shared = MLP(config, rngs, stack, shared) if shared else None
        self.w_shared_gate = weight(rngs, (*stack, d), d, config) if shared else None

    def __call__(self, x_BTD: Array, site: Sites) -> Array:
        """The sum of the experts, `[B,T,D]`. Padding is not masked yet."""
        cfg = self.config
        routing = self.route(x_BTD, site)
        groups = Groups(routing.index, cfg.n_experts)
        bias = routing.index if cfg.mlp_bias else None

        def product_of(x: Array, w: nnx.Param, b: nnx.Param | None) -> Array:
            y = groups.product(x, w[...], cfg)
            return y if b is None or bias is None else y + b[...].astype(y.dtype)[bias]

        x_BTkD = jnp.broadcast_to(x_BTD[..., None, :], (*routing.index.shape, x_BTD.shape[-1]))
        hidden_BTkF, gate_BTkF = product_of(x_BTkD, self.w_in, self.b_in), None
        if self.w_gate is not None:
            gate_BTkF = product_of(x_BTkD, self.w_gate, self.b_gate)
        hidden_BTkF = site("mlp_act", activated(hidden_BTkF, gate_BTkF, cfg).astype(cfg.operands))
        out_BTkD = product_of(hidden_BTkF, self.w_out, self.b_out)
        # The weight multiplies after the bias: an expert's bias is scaled like its units.
        out_BTD = jnp.sum(out_BTkD * routing.weight[..., None], -2)
        if self.shared is None:
            return out_BTD
        return out_BTD + self.shared(x_BTD, site, "shared_act") * routing.shared[..., None]

    def route(self, x_BTD: Array, site: Sites) -> Routing:
        """The experts of each token and the weight of each."""
        cfg = self.config
        router_BTE = affine("BTD,DE->BTE", x_BTD, self.w_router, self.b_router, cfg)
        router_BTE = site("router", router_BTE)
        top_BTk, index_BTk = jax.lax.top_k(router_BTE, cfg.experts_per_token)
        # Softmax over the k chosen equals softmax over all, divided by the sum of the chosen.
        if cfg.renormalise:
            weight_BTk = jax.nn.softmax(top_BTk, -1)
        else:
            weight_BTk = jnp.exp(top_BTk - jax.nn.logsumexp(router_BTE, -1, keepdims=True))
        shared_BT = ABSENT
        if self.w_shared_gate is not None:
            gate_BT = product("BTD,D->BT", x_BTD, self.w_shared_gate[...], config=cfg)
            shared_BT = site("shared_gate", jax.nn.sigmoid(gate_BT))
        return Routing(
            index=site("routing_index", index_BTk),
            weight=site("routing_weight", weight_BTk),
            shared=shared_BT,
        )


class Groups:
    """Rows of a batch sorted by expert, in blocks of one expert each.

    Each block is one product with its expert's matrix. So only experts in use cost time, and no
    matrix is copied for a token. `jax.lax.ragged_dot` does not serve: on CPU it computes every
    expert for every row, and it has no vmap.
    """

    def __init__(self, index: Int[Array, "B T k"], n_experts: int):
        self.shape = index.shape
        expert = index.reshape(-1)
        n = expert.shape[0]
        # A block holds at most half of an expert's mean number of rows, so that padding adds at
        # most half of all rows. It holds 8 where experts have few rows.
        self.size = max(8, 1 << max(n // (2 * n_experts), 1).bit_length() - 1)
        # Enough blocks for any routing: under jit, shapes must not depend on the routing.
        self.n_blocks = -(-(n + n_experts * (self.size - 1)) // self.size)
        order = jnp.argsort(expert)
        ordered = expert[order]
        count = jnp.zeros(n_experts, int).at[expert].add(1)
        blocks = -(-count // self.size)
        first_row, first_block = jnp.cumsum(count) - count, jnp.cumsum(blocks) - blocks
        # A sorted row's rank within its expert gives its slot in that expert's blocks.
        rank = jnp.arange(n) - first_row[ordered]
        slot = first_block[ordered] * self.size + rank
        self.slot = jnp.zeros(n, slot.dtype).at[order].set(slot)
        ends = jnp.cumsum(blocks)
        # Spare blocks at the end hold zeros only. They count as the last expert's.
        expert_of_block = jnp.searchsorted(ends, jnp.arange(self.n_blocks), side="right")
        self.expert = jnp.minimum(expert_of_block, n_experts - 1)

    def product(
        self, x: Float[Array, "B T k D"], w: Float[Array, "E D F"], config: ModelConfig
    ) -> Float[Array, "B T k F"]:
        """Each row times its expert's matrix."""
        rows = x.reshape(-1, x.shape[-1])
        padded = (
            jnp.zeros((self.n_blocks * self.size, x.shape[-1]), x.dtype).at[self.slot].set(rows)
        )
        blocks = rearrange(padded, "(n b) D -> n b D", b=self.size)

        def block_product(block: Array, expert: Array) -> Array:
            matrix = jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
            return product("bD,DF->bF", block, matrix, config=config)

        # A backward pass recomputes the block. Otherwise every block would keep a copy of a matrix.
        step: Callable = jax.checkpoint(block_product, prevent_cse=False)
        _, out = jax.lax.scan(lambda _, block: (None, step(*block)), None, (blocks, self.expert))
        return out.reshape(-1, out.shape[-1])[self.slot].reshape(*self.shape, -1)
