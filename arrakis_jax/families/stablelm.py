"""StableLM: Llama with LayerNorms and RoPE of a part of each head, optionally in parallel."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf | {"rms_norm_eps": hf["layer_norm_eps"]}) | {
        "norm": "layernorm",
        "qk_norm": "each_head" if hf["qk_layernorm"] else None,
        "qkv_bias": hf["use_qkv_bias"],
        "parallel": hf["use_parallel_residual"],
        "shared_norm": hf["use_parallel_residual"],
    }


_ATTENTION = decoder.LAYER + "self_attn."
# With normed queries and keys, each head's norm is a module of its own.
_RULES = (
    *decoder.LLAMA_RULES,
    *decoder.NORM_BIAS_RULES,
    rule(_ATTENTION + "q_layernorm.norms.{H}.weight", "K -> K", "blocks.attn.norm_q.w"),
    rule(_ATTENTION + "k_layernorm.norms.{G}.weight", "K -> K", "blocks.attn.norm_k.w"),
)

STABLELM = decoder.Decoder(
    name="stablelm",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 50304,
        "intermediate_size": 6912,
        "hidden_size": 2560,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "partial_rotary_factor": 0.25,
    },
    build=_arguments,
    rules=_RULES,
    nullable=(),
    ignored={
        "training": ("attention_dropout", "hidden_dropout"),
        "num_attention_heads, once more": ("num_heads",),
    },
    only={},
)
