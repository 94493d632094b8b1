"""Gemma 2: Gemma with norms on both sides, caps, and a window in every other layer."""

from typing import Any

from arrakis_jax.families import decoder, gemma
from arrakis_jax.families.base import HF_ACTIVATIONS, rule

# The fields that Gemma 3 has too.
SHARED_DEFAULTS = decoder.DEFAULTS | {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
}


def shared_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ModelConfig in which Gemma 2 and 3 agree."""
    return gemma.GEMMA.build(hf | {"hidden_act": hf["hidden_activation"]}) | {
        "norm_placement": "both",
        "attention_scale": decoder.positive(hf, "query_pre_attn_scalar") ** -0.5,
        "logit_softcap": hf["final_logit_softcapping"],
    }


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    windows = decoder.windows(hf, lambda layer: layer % 2 == 0)
    return shared_arguments(hf) | windows | {"attention_softcap": hf["attn_logit_softcapping"]}


# `post_attention_layernorm`, Llama's norm of what the MLP reads, is one of what attention writes.
_NORMS = (
    rule(decoder.LAYER + "input_layernorm.weight", "D -> D", "blocks.norm_attn.w"),
    rule(decoder.LAYER + "post_attention_layernorm.weight", "D -> D", "blocks.norm_attn_out.w"),
    rule(decoder.LAYER + "pre_feedforward_layernorm.weight", "D -> D", "blocks.norm_mlp.w"),
    rule(decoder.LAYER + "post_feedforward_layernorm.weight", "D -> D", "blocks.norm_mlp_out.w"),
)
_RULES = (*decoder.END_RULES, *decoder.ATTENTION_RULES, *_NORMS, *decoder.MLP_RULES)

GEMMA2 = decoder.Decoder(
    name="gemma2",
    defaults=SHARED_DEFAULTS | {"attn_logit_softcapping": 50.0},
    build=_arguments,
    rules=_RULES,
    nullable=(*decoder.NULLABLE, "final_logit_softcapping", "attn_logit_softcapping"),
    choices={"hidden_activation": HF_ACTIVATIONS},
    ignored=decoder.IGNORED
    | {
        "hidden_activation, as Gemma names it": ("hidden_act",),
        "sliding_window, once more": ("sliding_window_size",),
    },
    only=decoder.ONLY | {"use_bidirectional_attention": (False,)},
)
