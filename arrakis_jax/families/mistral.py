"""Mistral: Llama in which every layer reads a window, in its first versions."""

from typing import Any

from arrakis_jax.families import decoder


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    # Null, and so no window, in later versions.
    return decoder.llama_arguments(hf) | {"window": hf["sliding_window"]}


MISTRAL = decoder.Decoder(
    name="mistral",
    defaults=decoder.DEFAULTS
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    build=_arguments,
)
