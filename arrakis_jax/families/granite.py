"""Granite: Llama with factors on embeddings, scores, logits and all that is written."""

from typing import Any

from arrakis_jax.families import decoder


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf) | {
        "embed_scale": float(hf["embedding_multiplier"]),
        "attention_scale": float(hf["attention_multiplier"]),
        "residual_scale": float(hf["residual_multiplier"]),
        # Granite divides the logits by its factor.
        "logit_scale": 1 / decoder.positive(hf, "logits_scaling"),
    }


GRANITE = decoder.Decoder(
    name="granite",
    defaults=decoder.DEFAULTS
    | {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    build=_arguments,
)
