"""The description of a decoder: everything that decides what its forward computes."""

from dataclasses import dataclass, fields
from typing import Literal

import jax.numpy as jnp

from arrakis_jax.errors import expected

Activation = Literal["gelu", "gelu_tanh", "silu", "relu", "identity"]
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "relu", "identity")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1: long wavelengths are slowed down, short ones kept.

    Attributes:
        factor: how much longer the context becomes.
        low_freq_factor: wavelengths above `original_max_positions / low_freq_factor` are divided
            by `factor` in frequency.
        high_freq_factor: wavelengths below `original_max_positions / high_freq_factor` are kept;
            between the two the frequency is interpolated.
        original_max_positions: the context of the first training, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    expected(name, "positive", getattr(self, name), "see rope_scaling in config")
                )


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
        d_mlp: F, hidden width of the MLP; 0 for an attention-only model.
        vocab_size: V.
        norm: "layernorm", "rmsnorm" or None. One norm before attention, one before the MLP, one
            before the unembedding.
        norm_eps: added to the variance (LayerNorm) or mean square (RMSNorm).
        positions: "learned" (a table added to the embedding), "rope" or None.
        max_positions: rows of the learned table, or the context length a RoPE model was trained
            with (longer input is accepted).
        rope_theta: base wavelength of RoPE; None without RoPE.
        rope_scaling: scaling of the RoPE frequencies, or None.
        attention_scale: factor on query-key products; None for K ** -0.5.
        scale_by_inverse_layer: also divide the scores of layer l by l + 1 (a GPT-2 option).
        qkv_bias: biases on queries, keys and values.
        out_bias: a bias on the attention output.
        activation: nonlinearity of the MLP ("gelu" is the exact, erf form).
        gated: whether the MLP is act(x w_gate) * (x w_in) instead of act(x w_in).
        mlp_bias: biases on every MLP matrix.
        tied: whether the unembedding is the transposed embedding, stored once.
        unembed_bias: a bias on the logits.
        dtype: dtype of the weights. Norms, softmax, logits and the stream are computed in float32
            or wider.
        stream_dtype: "bfloat16" to round the residual stream to it after every write, which halves
            its memory; decompositions then have the rounding as terms of its own. None does not
            round.
        matmul_precision: JAX precision of float32 products ("highest", "high", "default").
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
    positions: Literal["learned", "rope"] | None
    max_positions: int
    rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    attention_scale: float | None = None
    scale_by_inverse_layer: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    activation: Activation = "identity"
    gated: bool = False
    mlp_bias: bool = False
    tied: bool = False
    unembed_bias: bool = False
    dtype: str = "float32"
    stream_dtype: Literal["bfloat16"] | None = None
    matmul_precision: Literal["highest", "high", "default"] = "highest"

    def __post_init__(self):
        problems = []

        def demand(condition: bool, name: str, must: str, do: str):
            if not condition:
                problems.append(expected(name, must, repr(getattr(self, name)), do))

        for field in fields(self):
            if field.type is int:
                least = 0 if field.name in ("n_layers", "d_mlp") else 1
                value = getattr(self, field.name)
                whole = isinstance(value, int) and not isinstance(value, bool)
                demand(whole and value >= least, field.name, f"an int >= {least}", "check it")
        if not problems:
            demand(self.n_heads % self.n_kv_heads == 0, "n_heads",
                   f"a multiple of n_kv_heads={self.n_kv_heads}", "change one of them")  # fmt: skip
        demand(self.norm in ("layernorm", "rmsnorm", None), "norm",
               "'layernorm', 'rmsnorm' or None", "choose one")  # fmt: skip
        has_eps = self.norm_eps is not None and self.norm_eps >= 0
        demand(has_eps == (self.norm is not None), "norm_eps",
               "a number >= 0 with a norm and None without", "set both or neither")  # fmt: skip
        demand(self.positions in ("learned", "rope", None), "positions",
               "'learned', 'rope' or None", "choose one")  # fmt: skip
        demand((self.positions == "rope") == (self.rope_theta is not None), "rope_theta",
               "set exactly with positions='rope'", "set both or neither")  # fmt: skip
        demand(self.rope_scaling is None or self.positions == "rope", "rope_scaling",
               "None without positions='rope'", "drop it")  # fmt: skip
        demand(self.activation in ACTIVATIONS, "activation", f"one of {ACTIVATIONS}", "choose one")
        demand(self.dtype in ("float32", "bfloat16", "float64"), "dtype",
               "'float32', 'bfloat16' or 'float64'", "choose one")  # fmt: skip
        demand(self.stream_dtype in (None, "bfloat16"), "stream_dtype",
               "'bfloat16' or None", "choose one")  # fmt: skip
        demand(self.matmul_precision in ("highest", "high", "default"), "matmul_precision",
               "'highest', 'high' or 'default'", "choose one")  # fmt: skip
        if self.positions == "rope":
            demand(self.d_head % 2 == 0, "d_head", "even with RoPE", "use an even head width")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def acc(self) -> jnp.dtype:
        """The dtype of norms, softmax, logits and every sum: at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def stream(self) -> jnp.dtype:
        """The dtype of the residual stream: `acc`, unless rounding is asked for."""
        return self.acc if self.stream_dtype is None else jnp.dtype(self.stream_dtype)
