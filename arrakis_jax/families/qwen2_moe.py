"""Qwen 1.5 and 2 MoE: Qwen 2 with experts, one of them shared, in some or all layers."""

from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    experts = expert_arguments(hf)
    if "n_experts" in experts:
        experts["d_shared_expert"] = hf["shared_expert_intermediate_size"]
    # Unlike in Qwen 2, windows are in every other one of the first layers.
    used = hf["use_sliding_window"]
    windows = decoder.windows(
        hf | {"sliding_window": hf["sliding_window"] if used else None},
        lambda layer: used and layer % 2 == 0 and layer < hf["max_window_layers"],
    )
    return decoder.llama_arguments(hf) | windows | experts | {"qkv_bias": hf["qkv_bias"]}


def expert_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments for MLPs and experts: every `decoder_sparse_step`-th layer has experts."""
    step, dense = decoder.positive(hf, "decoder_sparse_step"), hf["mlp_only_layers"] or ()
    n_layers = hf["num_hidden_layers"]
    if not all(type(layer) is int and 0 <= layer < n_layers for layer in dense):
        must = f"of layers in [0, {n_layers})"
        raise ValueError(expected("mlp_only_layers", must, dense, "correct it"))
    if hf["num_experts"] < 0:
        raise ValueError(expected("num_experts", ">= 0", hf["num_experts"], "correct it"))
    layers = tuple(
        hf["num_experts"] > 0 and layer not in dense and (layer + 1) % step == 0
        for layer in range(n_layers)
    )
    widths = {"d_mlp": 0 if all(layers) else hf["intermediate_size"]}
    if not any(layers):
        return widths
    return widths | {
        "n_experts": hf["num_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "d_expert": hf["moe_intermediate_size"],
        "renormalise": hf["norm_topk_prob"],
        "moe_layers": None if all(layers) else layers,
    }


_MOE = decoder.LAYER + "mlp."
# Older files have a tensor for each expert; those of transformers 5 are in `decoder`.
QWEN_EXPERT_RULES = (
    rule(_MOE + "experts.{E}.gate_proj.weight", "J D -> D J", "blocks.moe.w_gate"),
    rule(_MOE + "experts.{E}.up_proj.weight", "J D -> D J", "blocks.moe.w_in"),
    rule(_MOE + "experts.{E}.down_proj.weight", "D J -> J D", "blocks.moe.w_out"),
    *decoder.EXPERT_RULES,
)
_SHARED_EXPERT = (
    rule(_MOE + "shared_expert.gate_proj.weight", "U D -> D U", "blocks.moe.shared.w_gate"),
    rule(_MOE + "shared_expert.up_proj.weight", "U D -> D U", "blocks.moe.shared.w_in"),
    rule(_MOE + "shared_expert.down_proj.weight", "D U -> U D", "blocks.moe.shared.w_out"),
    rule(_MOE + "shared_expert_gate.weight", "() D -> D", "blocks.moe.w_shared_gate"),
)
_TYPES = decoder.TYPES | {"mlp_only_layers": list}

QWEN2_MOE = decoder.Decoder(
    name="qwen2_moe",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "qkv_bias": True,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
    },
    build=_arguments,
    rules=(*decoder.LLAMA_RULES, *QWEN_EXPERT_RULES, *_SHARED_EXPERT),
    types=_TYPES,
    ignored=decoder.IGNORED_OF_EXPERTS,
)
