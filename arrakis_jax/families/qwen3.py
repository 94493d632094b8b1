"""Qwen 3: Llama with normed queries and keys, and windows in the last layers."""

from typing import Any

from arrakis_jax.families import decoder, qwen2


def build(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ModelConfig."""
    return decoder.build(hf) | qwen2.windows(hf) | {"qk_norm": "head"}


FAMILY = decoder.Decoder(
    name="qwen3",
    defaults=qwen2.DEFAULTS | {"head_dim": 128, "attention_bias": False},
    build=build,
    rules=(*decoder.RULES, *decoder.QK_NORMS),
)
