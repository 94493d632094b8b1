"""gpt-oss: experts with biases, clipped gates, attention sinks, a window in every other layer."""

from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    packed = hf["quantization_config"]
    if packed is not None and packed.get("quant_method") != "mxfp4":
        must, do = "absent, or of quant_method 'mxfp4'", "convert the weights to bfloat16"
        raise ValueError(expected("quantization_config", must, packed, do))
    turns = _YARN if hf["rope_parameters"] is None else hf["rope_parameters"]
    # Gates are x sigmoid(1.702 x) in all models, whatever the config calls it.
    return {
        **decoder.llama_arguments(hf | {"rope_parameters": turns, "hidden_act": "quick_gelu"}),
        **decoder.windows(hf, lambda layer: layer % 2 == 0),
        "sinks": True,
        "mlp_bias": True,
        "mlp_limit": float(hf["swiglu_limit"]),
        "up_offset": 1.0,
        "d_mlp": 0,
        "n_experts": hf["num_local_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "d_expert": hf["intermediate_size"],
        "renormalise": True,
        "router_bias": True,
    }


# Experts are stored as they are multiplied, not transposed. Columns of gate and up alternate.
_MOE = decoder.LAYER + "mlp."
_RULES = (
    *decoder.END_RULES,
    *decoder.ATTENTION_RULES,
    *decoder.NORM_RULES,
    rule(decoder.LAYER + "self_attn.sinks", "H -> H", "blocks.attn.sinks"),
    rule(_MOE + "router.weight", "E D -> D E", "blocks.moe.w_router"),
    rule(_MOE + "router.bias", "E -> E", "blocks.moe.b_router"),
    rule(_MOE + "experts.gate_up_proj", "E D (J part) -> part E D J",
         "blocks.moe.w_gate", "blocks.moe.w_in"),
    rule(_MOE + "experts.gate_up_proj_bias", "E (J part) -> part E J",
         "blocks.moe.b_gate", "blocks.moe.b_in"),
    rule(_MOE + "experts.down_proj", "E J D -> E J D", "blocks.moe.w_out"),
    rule(_MOE + "experts.down_proj_bias", "E D -> E D", "blocks.moe.b_out"),
)  # fmt: skip

GPT_OSS = decoder.Decoder(
    name="gpt_oss",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": None,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "quantization_config": None,
    },
    build=_arguments,
    rules=_RULES,
    types=decoder.TYPES | {"quantization_config": dict},
    choices={},
    renamed={"num_experts": "num_local_experts"},
    ignored=decoder.IGNORED_OF_EXPERTS
    | {
        "always x sigmoid(1.702 x)": ("hidden_act",),
        "other names of fields, once more": ("experts_per_token", "initial_context_length"),
    },
    only=decoder.ONLY | {"swiglu_alpha": (1.702,)},
)
