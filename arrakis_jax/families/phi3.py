"""Phi-3 and Phi-4: Llama with fused weights, RoPE of a part of each head, and LongRoPE."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf) | {"window": hf["sliding_window"]}


# The rows of all queries come first, then keys, then values; those of the gate before `w_in`.
_RULES = (
    *decoder.END_RULES,
    *decoder.NORM_RULES,
    rule(decoder.LAYER + "self_attn.qkv_proj.weight", "(part K) D -> D part K",
         "blocks.attn.w_q", "blocks.attn.w_k", "blocks.attn.w_v", sizes=("H", "G", "G")),
    rule(decoder.LAYER + "self_attn.o_proj.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(decoder.LAYER + "mlp.gate_up_proj.weight", "(part F) D -> part D F",
         "blocks.mlp.w_gate", "blocks.mlp.w_in"),
    rule(decoder.LAYER + "mlp.down_proj.weight", "D F -> F D", "blocks.mlp.w_out"),
)  # fmt: skip

PHI3 = decoder.Decoder(
    name="phi3",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    },
    build=_arguments,
    rules=_RULES,
    ignored=decoder.IGNORED | {"training": ("attention_dropout", "embd_pdrop", "resid_pdrop")},
    only={
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "lm_head_bias": (False,),
        "full_attn_mod": (1,),
        "interpolate_factor": (1,),
    },
)
