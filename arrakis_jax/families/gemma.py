"""Gemma: Llama with gains 1 + w, scaled embeddings, tanh-GELU, and heads of their own width."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import HF_ACTIVATIONS


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf) | {
        # Gains are stored minus one.
        "norm_offset": 1.0,
        "embed_scale": decoder.positive(hf, "hidden_size") ** 0.5,
    }


GEMMA = decoder.Decoder(
    name="gemma",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "attention_bias": False,
    },
    build=_arguments,
    # The first files say "gelu" and mean its approximation.
    choices={"hidden_act": HF_ACTIVATIONS | {"gelu": "gelu_tanh"}},
    only=decoder.ONLY
    | {
        "use_bidirectional_attention": (False,),
        # Read by some versions in place of `hidden_act`.
        "hidden_activation": ("gelu_pytorch_tanh",),
    },
)
