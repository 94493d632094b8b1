"""Command R and Aya: attention and MLP in parallel on one LayerNorm without bias, RoPE of pairs."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf | {"rms_norm_eps": hf["layer_norm_eps"]}) | {
        "norm": "layernorm",
        "norm_bias": False,
        "parallel": True,
        "shared_norm": True,
        # Unlike Llama, it rotates the pairs (2i, 2i + 1).
        "rope_interleaved": True,
        "qk_norm": "each_head" if hf["use_qk_norm"] else None,
        "logit_scale": float(hf["logit_scale"]),
    }


_RULES = (
    *decoder.END_RULES,
    *decoder.ATTENTION_RULES,
    # Every head has its own gain.
    rule(decoder.LAYER + "self_attn.q_norm.weight", "H K -> H K", "blocks.attn.norm_q.w"),
    rule(decoder.LAYER + "self_attn.k_norm.weight", "G K -> G K", "blocks.attn.norm_k.w"),
    rule(decoder.LAYER + "input_layernorm.weight", "D -> D", "blocks.norm_attn.w"),
    *decoder.MLP_RULES,
)

COHERE = decoder.Decoder(
    name="cohere",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "logit_scale": 0.0625,
        "use_qk_norm": False,
    },
    build=_arguments,
    rules=_RULES,
    nullable=(*decoder.NULLABLE, "use_qk_norm"),
    ignored=decoder.IGNORED | {"of the tokenizer": ("model_max_length",)},
)
