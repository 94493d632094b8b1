"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and windows in the last layers."""

from typing import Any

from arrakis_jax.families import decoder


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    # Queries, keys and values always have biases, which no field of the class mentions.
    return decoder.llama_arguments(hf) | late_windows(hf) | {"qkv_bias": True}


def late_windows(hf: dict[str, Any]) -> dict[str, Any]:
    """`window` and `window_layers`: if windows are used, from layer `max_window_layers` on."""
    width = hf["sliding_window"] if hf["use_sliding_window"] else None
    return decoder.windows(
        hf | {"sliding_window": width},
        lambda layer: width is not None and layer >= hf["max_window_layers"],
    )


_DEFAULTS = decoder.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

QWEN2 = decoder.Decoder(
    name="qwen2",
    defaults=_DEFAULTS,
    build=_arguments,
    only=decoder.ONLY | {"use_mrope": (False,)},
)
