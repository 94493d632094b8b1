"""The description of a decoder: everything that decides what its forward computes."""

from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Literal

import jax.numpy as jnp

from arrakis_jax.core.axes import Array
from arrakis_jax.core.config_rules import problems_of
from arrakis_jax.core.rope_scaling import RopeScaling


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Frozen, hashable description of a decoder-only transformer.

    Nothing that a checkpoint determines has a default; a default means "feature absent".

    Attributes:
        n_layers: L, number of blocks; 0 gives a bigram model.
        d_model: D, width of the residual stream.
        n_heads: H, query heads.
        n_kv_heads: G, key/value heads; query head h reads key/value head h // R, with R = H / G.
        d_head: K, width of one head; need not be D / H.
        d_mlp: F, hidden width of the (dense) MLP; 0 if no layer has one.
        vocab_size: V.
        norm: "layernorm", "rmsnorm" or None.
        norm_eps: added to the variance (LayerNorm) or mean square (RMSNorm).
        norm_gain: whether norms have a gain `w`.
        norm_bias: whether LayerNorms have a bias `b`. (RMSNorms have none.)
        norm_offset: the gain is `w + norm_offset` (Gemma: 1).
        norm_placement: where norms are. "pre": on the inputs of attention and MLP. "post": on their
            outputs. "both": on both. "stream_before": on the stream itself, before each of them
            reads it. "stream_after": on the stream itself, after the output of each is added.
        final_norm: whether there is a norm before the unembedding.
        embed_norm: whether token embeddings are normed (BLOOM).
        positions: "learned" (a table added to the embedding), "rope", "alibi" or None.
        max_positions: the longest input of a learned table, or the context length a model was
            trained with (longer input is accepted with RoPE and ALiBi).
        position_offset: rows of the learned table before that of position 0 (OPT: 2).
        rope_theta: base wavelength of RoPE; None without RoPE.
        rope_scaling: scaling of the RoPE frequencies, or None.
        rotary_dim: how many of a head's dimensions are rotated, the first ones; None for all.
        rope_interleaved: pairs are (2i, 2i + 1) in place of (i, i + rotary_dim / 2).
        rope_layers: which layers rotate, one bool for each; None for all.
        falcon_alibi: ALiBi's biases are rounded to bfloat16 and scaled together with the products.
        window: how many positions a query reads, itself included; None for all before it.
        window_layers: which layers have that window, one bool for each; None for all.
        window_rope_theta: base wavelength in the layers with a window. None: these layers have
            `rope_theta` and `rope_scaling` too.
        window_rope_scaling: scaling of the frequencies in the layers with a window, if
            `window_rope_theta` is given.
        attention_scale: factor on the products of queries and keys; None for K ** -0.5.
        scale_by_inverse_layer: also divide the scores of layer l by l + 1 (a GPT-2 option).
        attention_softcap: c; scores become `c tanh(scores / c)`.
        sinks: a learned score for each head that takes part in the softmax and reads nothing, so
            that a row of the pattern sums to less than one.
        clip_qkv: queries, keys and values are clipped to [-clip_qkv, clip_qkv], after the norms of
            `qk_norm` and before RoPE.
        qk_norm: a norm on queries and keys before RoPE: of each head with one gain ("head"), of
            each head with its own gain ("each_head"), over all heads at once ("all_heads").
        qk_norm_bias: whether that norm has a bias.
        qkv_bias: biases on queries, keys and values.
        out_bias: a bias on the attention output.
        parallel: attention and MLP read the same stream point, so that there is no `resid_mid`.
        shared_norm: attention and MLP of a parallel block read one norm, `norm_attn`.
        activation: nonlinearity of the MLP ("gelu" is the exact, erf form; "gelu_bloom" is
            "gelu_tanh" with sqrt(2 / pi) written as 0.79788456).
        gated: whether the MLP is act(x w_gate) * (x w_in) instead of act(x w_in).
        mlp_bias: biases on every MLP matrix, experts' included.
        mlp_limit: in a gated MLP, x w_gate is clipped to at most this, and x w_in to
            [-mlp_limit, mlp_limit] (gpt-oss).
        up_offset: added to x w_in before the gate multiplies it (gpt-oss: 1).
        n_experts: E, experts of a mixture-of-experts layer; 0 for none.
        experts_per_token: k, to how many experts a token is sent.
        d_expert: F of one expert.
        d_shared_expert: F of an expert for every token, with a sigmoid gate; 0 for none.
        renormalise: whether the k routing weights are divided by their sum.
        router_bias: a bias on the router's scores.
        moe_layers: which layers have experts, one bool for each; None for all.
        residual_scale: factor on everything that attention and MLP write (Granite).
        embed_scale: factor on token embeddings, rounded to `dtype` (Gemma: sqrt(D)).
        d_embed: width of the token embeddings, if they are projected to D and back (OPT-350m).
        logit_scale: factor on the logits (Cohere, Granite).
        logit_softcap: c; logits become `c tanh(logits / c)`.
        tied: whether the unembedding is the transposed embedding, stored once.
        unembed_bias: a bias on the logits.
        dtype: dtype of the weights. Norms, softmax, logits and the stream are computed in float32
            or wider.
        stream_dtype: "bfloat16" rounds the residual stream to it after every write, which halves
            its memory; decompositions then have terms for the rounding. None does not round.
        matmul_precision: JAX precision of float32 products ("highest", "high", "default"). Weights
            in bfloat16 are widened for these products. With "default" the other operand is rounded
            to bfloat16 in their place, gradients too: faster and less exact
            (benchmarks/bfloat16.py), and JAX can differentiate the model in reverse mode only.
    """

    # Sizes.
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    # Norms.
    norm: Literal["layernorm", "rmsnorm"] | None
    norm_eps: float | None
    norm_gain: bool = True
    norm_bias: bool = True
    norm_offset: float = 0.0
    norm_placement: Literal["pre", "post", "both", "stream_before", "stream_after"] = "pre"
    final_norm: bool = True
    embed_norm: bool = False
    # Positions: which are known, and how far a query reads.
    positions: Literal["learned", "rope", "alibi"] | None
    max_positions: int
    position_offset: int = 0
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    rope_interleaved: bool = False
    rope_layers: tuple[bool, ...] | None = None
    falcon_alibi: bool = False
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    window_rope_theta: float | None = None
    window_rope_scaling: RopeScaling | None = None
    # Attention.
    attention_scale: float | None = None
    scale_by_inverse_layer: bool = False
    attention_softcap: float | None = None
    sinks: bool = False
    clip_qkv: float | None = None
    qk_norm: Literal["head", "each_head", "all_heads"] | None = None
    qk_norm_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    # MLPs and experts.
    parallel: bool = False
    shared_norm: bool = False
    activation: Literal[
        "gelu", "gelu_tanh", "gelu_bloom", "quick_gelu", "silu", "relu", "identity"
    ] = "identity"
    gated: bool = False
    mlp_bias: bool = False
    mlp_limit: float | None = None
    up_offset: float = 0.0
    n_experts: int = 0
    experts_per_token: int = 0
    d_expert: int = 0
    d_shared_expert: int = 0
    renormalise: bool = False
    router_bias: bool = False
    moe_layers: tuple[bool, ...] | None = None
    # The stream and its ends.
    residual_scale: float = 1.0
    embed_scale: float = 1.0
    d_embed: int | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False
    unembed_bias: bool = False
    # Precision.
    dtype: str = "float32"
    stream_dtype: Literal["bfloat16"] | None = None
    matmul_precision: Literal["highest", "high", "default"] = "highest"

    def __post_init__(self):
        self._from_json()
        problems = problems_of(self)
        if problems:
            raise ValueError("\n".join(problems))

    def _from_json(self):
        """Lists and tables, as a JSON file holds them, become tuples and RopeScalings."""
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, dict):
                entries: dict[str, Any] = {
                    name: tuple(entry) if isinstance(entry, list) else entry
                    for name, entry in value.items()
                }
                value = RopeScaling(**entries)
            # The dataclass is frozen, also for its own initialisation.
            object.__setattr__(self, field.name, value)

    @property
    def acc(self) -> jnp.dtype:
        """The dtype of norms, softmax, logits and every sum: at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def operands(self) -> jnp.dtype:
        """The dtype of the operands of products."""
        rounded = self.dtype == "bfloat16" and self.matmul_precision == "default"
        return jnp.dtype(self.dtype) if rounded else self.acc

    @property
    def stream(self) -> jnp.dtype:
        """The dtype of the residual stream: `acc`, unless rounding is asked for."""
        return self.acc if self.stream_dtype is None else jnp.dtype(self.stream_dtype)

    @property
    def d_rotary(self) -> int:
        """How many of a head's dimensions RoPE rotates."""
        return self.d_head if self.rotary_dim is None else self.rotary_dim

    @property
    def rotary_pairs(self) -> int:
        """How many pairs of a head's dimensions RoPE rotates."""
        return self.d_rotary // 2

    @property
    def heads_per_group(self) -> int:
        """R, how many query heads share a key/value head."""
        return self.n_heads // self.n_kv_heads

    def score_scale(self, layer: Array | int) -> Array | float:
        """The factor on the products of queries and keys in a layer."""
        scale = self.d_head**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.scale_by_inverse_layer else scale

    # What a norm placement means, once for the whole package. Block.__call__ puts the norms there.
    # A new one is added to the Literal, to config_rules.py, here and there. One on the stream also
    # concerns frozen/, terms/stream_norms.py and terms/scan.py, which take a term through it.
    @property
    def norms_inputs(self) -> bool:
        """Whether attention and the MLP read through norms of their own."""
        return self.norm is not None and self.norm_placement in ("pre", "both")

    @property
    def norms_outputs(self) -> bool:
        """Whether what attention and the MLP write passes norms."""
        return self.norm is not None and self.norm_placement in ("post", "both")

    @property
    def norms_stream(self) -> bool:
        """Whether norms are applied to the stream itself, which then is not a plain sum."""
        return self.norm_placement in ("stream_before", "stream_after")

    @property
    def segments(self) -> tuple[tuple[bool, int], ...]:
        """Consecutive layers of the same parameters: whether they have experts, and how many."""
        # Every layer is of one kind, or there is none.
        if not self.moe_layers:
            return ((self.n_experts > 0, self.n_layers),)
        return tuple((moe, len(list(layers))) for moe, layers in groupby(self.moe_layers))

    def has_mlp(self, moe: bool) -> bool:
        """Whether a layer, with experts (`moe`) or without, has an MLP; experts count as one."""
        return moe or self.d_mlp > 0

    @property
    def any_mlp(self) -> bool:
        """Whether some layer has an MLP; experts count as one."""
        return self.has_mlp(self.n_experts > 0)
