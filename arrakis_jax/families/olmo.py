"""OLMo: Llama with LayerNorms without gain and bias, and clipped queries, keys and values."""

from typing import Any

from arrakis_jax.families import decoder


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    # The class has no field for epsilon.
    return decoder.llama_arguments(hf | {"rms_norm_eps": 1e-5}) | {
        "norm": "layernorm",
        "norm_gain": False,
        "norm_bias": False,
        "clip_qkv": hf["clip_qkv"],
    }


OLMO = decoder.Decoder(
    name="olmo",
    defaults=decoder.DEFAULTS
    | {"vocab_size": 50304, "hidden_act": "silu", "attention_bias": False, "clip_qkv": None},
    build=_arguments,
    rules=(*decoder.END_RULES, *decoder.ATTENTION_RULES, *decoder.MLP_RULES),
    types=decoder.TYPES | {"clip_qkv": float},
)
