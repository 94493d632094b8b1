"""Qwen 3: Llama with normed queries and keys, and windows in the last layers."""

from typing import Any

from arrakis_jax.families import decoder, qwen2


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf) | qwen2.late_windows(hf) | {"qk_norm": "head"}


QWEN3 = decoder.Decoder(
    name="qwen3",
    defaults={**qwen2.QWEN2.defaults, "head_dim": 128, "attention_bias": False},
    build=_arguments,
    rules=(*decoder.LLAMA_RULES, *decoder.QK_NORM_RULES),
)
