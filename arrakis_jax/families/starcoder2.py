"""StarCoder 2: Llama with LayerNorms, biases everywhere, and an MLP without a gate."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    # One field for all biases.
    bias = hf["use_bias"]
    llama = hf | {"rms_norm_eps": hf["norm_epsilon"], "attention_bias": bias, "mlp_bias": bias}
    return decoder.llama_arguments(llama) | {
        "norm": "layernorm",
        "window": hf["sliding_window"],
        "gated": False,
    }


_RULES = (
    *decoder.END_RULES,
    *decoder.ATTENTION_RULES,
    *decoder.NORM_RULES,
    *decoder.NORM_BIAS_RULES,
    rule(decoder.LAYER + "mlp.c_fc.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(decoder.LAYER + "mlp.c_fc.bias", "F -> F", "blocks.mlp.b_in"),
    rule(decoder.LAYER + "mlp.c_proj.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(decoder.LAYER + "mlp.c_proj.bias", "D -> D", "blocks.mlp.b_out"),
)

STARCODER2 = decoder.Decoder(
    name="starcoder2",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 4096,
        "norm_epsilon": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
        "sliding_window": None,
    },
    build=_arguments,
    rules=_RULES,
    ignored=decoder.IGNORED
    | {
        "training": ("attention_dropout", "embedding_dropout", "residual_dropout"),
        "names of its first training code": ("activation_function", "layer_norm_epsilon"),
        "the same in exact arithmetic": (
            "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32",
        ),
    },
    only=decoder.ONLY
    | {
        "mlp_type": ("default",),
        "norm_type": ("layer_norm",),
        "scale_attn_weights": (True,),
    },
)
