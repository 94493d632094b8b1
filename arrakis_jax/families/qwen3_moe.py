"""Qwen 3 MoE: Qwen 3 with experts in some or all layers, and windows in all layers or none."""

from typing import Any

from arrakis_jax.families import decoder, qwen2_moe


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    # Unlike in Qwen 2 and 3, all layers have the window.
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    return (
        decoder.llama_arguments(hf)
        | qwen2_moe.expert_arguments(hf)
        | {"window": window, "qk_norm": "head"}
    )


QWEN3_MOE = decoder.Decoder(
    name="qwen3_moe",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    build=_arguments,
    rules=(*decoder.LLAMA_RULES, *decoder.QK_NORM_RULES, *qwen2_moe.QWEN_EXPERT_RULES),
    types=qwen2_moe.QWEN2_MOE.types,
    renamed={"num_local_experts": "num_experts"},
    ignored=decoder.IGNORED_OF_EXPERTS | {"not read by the model": ("max_window_layers",)},
)
