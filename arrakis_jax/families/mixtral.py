"""Mixtral: Mistral with experts, whose weights sum to one, in place of each MLP."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf) | {
        "window": hf["sliding_window"],
        "d_mlp": 0,
        "n_experts": hf["num_local_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "d_expert": hf["intermediate_size"],
        "renormalise": True,
    }


_MOE = decoder.LAYER + "block_sparse_moe."
_RULES = (
    *decoder.END_RULES,
    *decoder.ATTENTION_RULES,
    *decoder.NORM_RULES,
    # w1 is the gate, w3 what it multiplies, w2 the output.
    rule(_MOE + "gate.weight", "E D -> D E", "blocks.moe.w_router"),
    rule(_MOE + "experts.{E}.w1.weight", "J D -> D J", "blocks.moe.w_gate"),
    rule(_MOE + "experts.{E}.w3.weight", "J D -> D J", "blocks.moe.w_in"),
    rule(_MOE + "experts.{E}.w2.weight", "D J -> J D", "blocks.moe.w_out"),
    *decoder.EXPERT_RULES,
)

MIXTRAL = decoder.Decoder(
    name="mixtral",
    defaults=decoder.DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    build=_arguments,
    rules=_RULES,
    renamed={"num_experts": "num_local_experts"},
    ignored=decoder.IGNORED_OF_EXPERTS,
)
