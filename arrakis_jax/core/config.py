"""The description of a decoder: everything that decides what its forward computes."""

from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Literal, get_args

import jax.numpy as jnp

from arrakis_jax.core.errors import expected

Activation = Literal[
    "gelu", "gelu_tanh", "gelu_bloom", "quick_gelu", "silu", "relu", "identity"
]  # fmt: skip
ACTIVATIONS = ("gelu", "gelu_tanh", "gelu_bloom", "quick_gelu", "silu", "relu", "identity")
PLACEMENTS = ("pre", "post", "both", "stream_before", "stream_after")
QK_NORMS = ("head", "each_head", "all_heads")

# What each kind of RoPE scaling needs, besides `kind` and `attention_factor`.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_positions"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_positions"),
    "longrope": ("short_factor", "long_factor", "original_max_positions"),
}


# What the values of a field must be, by the type in its annotation.
_TYPES = {
    int: "an int",
    float: "a finite number",
    bool: "True or False",
    tuple[bool, ...]: "a tuple of bools",
}


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and -1e300 < value < 1e300
    if kind == tuple[bool, ...]:
        return isinstance(value, tuple) and all(isinstance(v, bool) for v in value)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than those first trained on.

    Attributes:
        kind: "llama3" (long wavelengths are slowed down, short ones kept), "linear" (all are
            slowed down), "dynamic" (the base grows with the longest row of the batch), "yarn"
            (interpolated by rotations), or "longrope" (a factor for each frequency, one list for
            batches that fit the first context, and one for longer ones).
        factor: how much longer the context becomes.
        low_freq_factor: llama3: wavelengths above `original_max_positions / low_freq_factor` are
            divided by `factor` in frequency.
        high_freq_factor: llama3: wavelengths below `original_max_positions / high_freq_factor` are
            kept; between the two the frequency is interpolated.
        original_max_positions: the context of the first training, in tokens.
        beta_fast: yarn: frequencies that turn more often than this in the first context are kept.
        beta_slow: yarn: those that turn less often are divided by `factor`.
        truncate: yarn: whether the bounds of the interpolation are rounded to whole dimensions.
        short_factor: longrope: a divisor for each frequency.
        long_factor: longrope: the same, when the longest row exceeds the first context.
        attention_factor: multiplies cosines and sines (so that scores grow by its square).
    """

    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_positions: int | None = None
    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"] = "llama3"
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            must = f"one of {tuple(ROPE_SCALINGS)}"
            raise ValueError(expected("kind", must, repr(self.kind), "choose one"))
        for name in (*ROPE_SCALINGS[self.kind], "attention_factor"):
            value, listed = getattr(self, name), name in ("short_factor", "long_factor")
            values = value if listed and isinstance(value, tuple) else (value,)
            right = bool(values) and all(_fits(v, float) and v > 0 for v in values)
            if not right or listed != isinstance(value, tuple):
                must = "a tuple of numbers > 0" if listed else "a number > 0"
                do = f"a scaling of kind {self.kind!r} needs it"
                raise ValueError(expected(name, must, repr(value), do))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Frozen, hashable description of a decoder-only transformer.

    Nothing that a checkpoint determines has a default; a default means "feature absent".

    Attributes:
        n_layers: L, number of blocks; 0 gives a bigram model.
        d_model: D, width of the residual stream.
        n_heads: H, query heads.
        n_kv_heads: G, key/value heads; query head h reads key/value head h // (H / G).
        d_head: K, width of one head; need not be D / H.
        d_mlp: F, hidden width of the (dense) MLP; 0 if no layer has one.
        vocab_size: V.
        norm: "layernorm", "rmsnorm" or None.
        norm_eps: added to the variance (LayerNorm) or mean square (RMSNorm).
        norm_gain: whether norms have a gain `w`.
        norm_bias: whether LayerNorms have a bias `b`. (RMSNorms have none.)
        norm_offset: the gain is `w + norm_offset` (Gemma: 1).
        norm_placement: what is normed. "pre": what attention and MLP read. "post": what they
            write. "both": what they read and what they write. "stream_before": the stream itself
            before each of them (which read it), "stream_after": the stream itself after each of
            them is added.
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
        window_rope_theta: base wavelength in the layers with a window; None for `rope_theta` and
            `rope_scaling` in all of them.
        window_rope_scaling: scaling of the frequencies in the layers with a window, if
            `window_rope_theta` is given.
        attention_scale: factor on query-key products; None for K ** -0.5.
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
        mlp_limit: a gated MLP's gate is clipped to at most this, and what it multiplies to
            [-mlp_limit, mlp_limit] (gpt-oss).
        up_offset: added to what the gate multiplies (gpt-oss: 1).
        n_experts: E, experts of a mixture-of-experts layer; 0 for none.
        experts_per_token: k, how many of them a token is sent to.
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
        stream_dtype: "bfloat16" to round the residual stream to it after every write, which halves
            its memory; decompositions then have the rounding as terms of its own. None does not
            round.
        matmul_precision: JAX precision of float32 products ("highest", "high", "default"). Weights
            in bfloat16 are widened for them, except with "default": then what they multiply is
            rounded to bfloat16, gradients too, which is faster and less exact
            (benchmarks/bfloat16.py). JAX can then differentiate the model in reverse mode only.
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    vocab_size: int
    norm: Literal["layernorm", "rmsnorm"] | None
    norm_eps: float | None
    norm_gain: bool = True
    norm_bias: bool = True
    norm_offset: float = 0.0
    norm_placement: Literal["pre", "post", "both", "stream_before", "stream_after"] = "pre"
    final_norm: bool = True
    embed_norm: bool = False
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
    attention_scale: float | None = None
    scale_by_inverse_layer: bool = False
    attention_softcap: float | None = None
    sinks: bool = False
    clip_qkv: float | None = None
    qk_norm: Literal["head", "each_head", "all_heads"] | None = None
    qk_norm_bias: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    parallel: bool = False
    shared_norm: bool = False
    activation: Activation = "identity"
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
    residual_scale: float = 1.0
    embed_scale: float = 1.0
    d_embed: int | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False
    unembed_bias: bool = False
    dtype: str = "float32"
    stream_dtype: Literal["bfloat16"] | None = None
    matmul_precision: Literal["highest", "high", "default"] = "highest"

    def __post_init__(self):
        self._from_json()
        problems = []

        def demand(condition: bool, name: str, must: str, do: str = "choose one"):
            if not condition:
                problems.append(expected(name, must, repr(getattr(self, name)), do))

        may_be_zero = ("n_layers", "d_mlp", "position_offset", "n_experts", "experts_per_token",
                       "d_expert", "d_shared_expert")  # fmt: skip
        kinds = _TYPES | {RopeScaling: "a RopeScaling"}
        for field in fields(self):
            value, given = getattr(self, field.name), (get_args(field.type) or (field.type,))
            kind, optional = next((k for k in given if k in kinds), None), type(None) in given
            if kind is None or (optional and value is None):
                continue
            least = (0 if field.name in may_be_zero else 1) if kind is int else None
            right = _fits(value, kind) and (least is None or value >= least)
            must = kinds[kind] + (f" >= {least}" if kind is int else "")
            demand(right, field.name, must + (" or None" if optional else ""), "check it")
        if problems:  # what follows compares numbers
            raise ValueError("\n".join(problems))
        for name in ("rope_layers", "window_layers", "moe_layers"):
            value = getattr(self, name)
            demand(value is None or len(value) == self.n_layers, name,
                   f"None or {self.n_layers} bools", "give one for each layer")  # fmt: skip
        demand(self.n_heads % self.n_kv_heads == 0, "n_heads",
               f"a multiple of n_kv_heads={self.n_kv_heads}", "change one of them")  # fmt: skip
        choices = {
            "norm": ("layernorm", "rmsnorm", None),
            "norm_placement": PLACEMENTS,
            "positions": ("learned", "rope", "alibi", None),
            "qk_norm": (*QK_NORMS, None),
            "activation": ACTIVATIONS,
            "dtype": ("float32", "bfloat16", "float64"),
            "stream_dtype": ("bfloat16", None),
            "matmul_precision": ("highest", "high", "default"),
        }
        for name, values in choices.items():
            demand(getattr(self, name) in values, name, f"one of {values}")
        has_eps = self.norm_eps is not None and self.norm_eps >= 0
        demand(has_eps == (self.norm is not None), "norm_eps",
               "a number >= 0 with a norm and None without", "set both or neither")  # fmt: skip
        demand((self.positions == "rope") == (self.rope_theta is not None), "rope_theta",
               "set exactly with positions='rope'", "set both or neither")  # fmt: skip
        for name in ("rope_scaling", "rotary_dim", "rope_layers", "window_rope_theta"):
            demand(getattr(self, name) is None or self.positions == "rope", name,
                   "None without positions='rope'", "drop it")  # fmt: skip
        demand(self.window_rope_scaling is None or self.window_rope_theta is not None,
               "window_rope_scaling", "None without window_rope_theta", "drop it")  # fmt: skip
        for name in ("window_layers", "window_rope_theta"):
            demand(getattr(self, name) is None or self.window is not None, name,
                   "None without a window", "set both or neither")  # fmt: skip
        for name in ("rope_theta", "window_rope_theta", "attention_softcap", "logit_softcap",
                     "clip_qkv", "mlp_limit"):  # fmt: skip
            value = getattr(self, name)
            demand(value is None or value > 0, name, "a number > 0 or None", "correct it")
        if self.positions == "rope":
            demand(self.d_rotary % 2 == 0 and self.d_rotary <= self.d_head,
                   "d_head" if self.rotary_dim is None else "rotary_dim",
                   f"even with RoPE, and at most d_head={self.d_head}",
                   "change one of them")  # fmt: skip
        demand(not self.position_offset or self.positions == "learned", "position_offset",
               "0 without positions='learned'", "drop it")  # fmt: skip
        for prefix in ("", "window_"):
            scaling = getattr(self, f"{prefix}rope_scaling")
            theta, pairs = getattr(self, f"{prefix}rope_theta"), self.d_rotary // 2
            if scaling is None:
                continue
            demand(scaling.kind != "dynamic" or pairs > 1, "rotary_dim",
                   "more than 2 with dynamic scaling", "choose another scaling")  # fmt: skip
            demand(scaling.kind != "yarn" or (theta or 0) > 1, f"{prefix}rope_theta",
                   "more than 1 with yarn scaling", "correct it")  # fmt: skip
            lengths = {len(f or ()) for f in (scaling.short_factor, scaling.long_factor)}
            demand(scaling.kind != "longrope" or lengths == {pairs}, f"{prefix}rope_scaling",
                   f"with {pairs} factors in each list", "give one for each pair")  # fmt: skip
        demand(not self.falcon_alibi or self.positions == "alibi", "falcon_alibi",
               "False without positions='alibi'", "drop it")  # fmt: skip
        demand(not self.shared_norm or self.parallel, "shared_norm", "False without parallel",
               "set both or neither")  # fmt: skip
        demand(not self.parallel or self.norm_placement == "pre", "norm_placement",
               "'pre' with parallel", "no other is supported")  # fmt: skip
        normed = self.norm_placement != "pre" or self.embed_norm or self.qk_norm is not None
        demand(self.norm is not None or not normed, "norm", "set where norms are asked for",
               "choose one, or drop norm_placement, embed_norm and qk_norm")  # fmt: skip
        experts = (self.experts_per_token, self.d_expert)
        demand(all(experts) if self.n_experts else not any((*experts, self.d_shared_expert)),
               "n_experts", "set with experts_per_token and d_expert, or 0 with both 0 (and "
               "d_shared_expert)", "set all or none")  # fmt: skip
        demand(self.experts_per_token <= self.n_experts, "experts_per_token",
               f"at most n_experts={self.n_experts}", "change one of them")  # fmt: skip
        dense = self.moe_layers is not None and not all(self.moe_layers)
        if self.n_experts:
            demand((self.d_mlp > 0) == dense, "d_mlp",
                   "positive if some layer has no experts, else 0", "check it")  # fmt: skip
        for name in ("moe_layers", "router_bias", "renormalise"):
            demand(not getattr(self, name) or self.n_experts > 0, name,
                   "unset without n_experts", "drop it")  # fmt: skip
        demand(not self.norms_stream or self.d_mlp > 0 or self.n_experts > 0, "norm_placement",
               "another one in a model without MLPs", "no other is supported")  # fmt: skip
        demand(not self.stream_dtype or not self.norm_placement.startswith("stream"),
               "stream_dtype", f"None with norm_placement={self.norm_placement!r}",
               "its rounding would be no term of a decomposition")  # fmt: skip
        if problems:
            raise ValueError("\n".join(problems))

    def _from_json(self):
        """Lists and tables, as a JSON file holds them, become tuples and RopeScalings."""
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, dict):
                about: dict[str, Any] = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in value.items()
                }
                value = RopeScaling(**about)
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
    def norms_stream(self) -> bool:
        """Whether norms are applied to the stream itself, which is then no plain sum."""
        return self.norm_placement.startswith("stream")

    @property
    def segments(self) -> tuple[tuple[bool, int], ...]:
        """Consecutive layers of the same parameters: whether they have experts, and how many."""
        if not self.moe_layers:
            return ((self.n_experts > 0, self.n_layers),)
        return tuple((moe, len(list(layers))) for moe, layers in groupby(self.moe_layers))

    def has_mlp(self, moe: bool) -> bool:
        """Whether a layer with or without experts has an MLP."""
        return moe or self.d_mlp > 0
