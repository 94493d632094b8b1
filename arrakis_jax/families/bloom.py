"""BLOOM: LayerNorm, also of the embeddings, ALiBi, biases everywhere, tied embeddings."""

from typing import Any

from arrakis_jax.families.base import Family, norm_rules, per_head, rule

_DEFAULTS = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "layer_norm_epsilon": 1e-5,
    "apply_residual_connection_post_layernorm": False,
    "tie_word_embeddings": True,
}
_TRAINED = 2048  # tokens; no config field has this number, and ALiBi accepts longer texts


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    width = hf["hidden_size"]
    normed = hf["apply_residual_connection_post_layernorm"]
    return {
        "n_layers": hf["n_layer"],
        "d_model": width,
        "n_heads": hf["n_head"],
        "n_kv_heads": hf["n_head"],
        "d_head": per_head(width, hf["n_head"], "hidden_size"),
        # The class has no field for this width.
        "d_mlp": 4 * width,
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "norm_placement": "stream_before" if normed else "pre",
        "embed_norm": True,
        "positions": "alibi",
        "max_positions": _TRAINED,
        "qkv_bias": True,
        "out_bias": True,
        "activation": "gelu_bloom",
        "mlp_bias": True,
        "tied": hf["tie_word_embeddings"],
    }


_LAYER = "transformer.h.{l}."
# Each head's query, key and value stand together, head after head.
_RULES = (
    rule("transformer.word_embeddings.weight", "V D -> V D", "w_e"),
    *norm_rules("transformer.word_embeddings_layernorm", "norm_embed"),
    *norm_rules(_LAYER + "input_layernorm", "blocks.norm_attn"),
    rule(_LAYER + "self_attention.query_key_value.weight", "(H part K) D -> part D H K",
         "blocks.attn.w_q", "blocks.attn.w_k", "blocks.attn.w_v"),
    rule(_LAYER + "self_attention.query_key_value.bias", "(H part K) -> part H K",
         "blocks.attn.b_q", "blocks.attn.b_k", "blocks.attn.b_v"),
    rule(_LAYER + "self_attention.dense.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(_LAYER + "self_attention.dense.bias", "D -> D", "blocks.attn.b_o"),
    *norm_rules(_LAYER + "post_attention_layernorm", "blocks.norm_mlp"),
    rule(_LAYER + "mlp.dense_h_to_4h.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(_LAYER + "mlp.dense_h_to_4h.bias", "F -> F", "blocks.mlp.b_in"),
    rule(_LAYER + "mlp.dense_4h_to_h.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(_LAYER + "mlp.dense_4h_to_h.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("transformer.ln_f", "norm_final"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)  # fmt: skip

BLOOM = Family(
    name="bloom",
    defaults=_DEFAULTS,
    build=_arguments,
    rules=_RULES,
    prefix="transformer.",
    renamed={
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored={
        "training": (
            "attention_dropout", "hidden_dropout", "bias_dropout_fusion", "skip_bias_add",
            "skip_bias_add_qkv", "seq_length",
        ),
        "how the products are split over devices": ("pretraining_tp",),
        "how Megatron ran it": (
            "attention_softmax_in_fp32", "masked_softmax_fusion", "offset_alibi",
        ),
    },
    # With `pretraining_tp`, Hugging Face's slow path leaves out two biases.
    only={"slow_but_exact": (False,), "n_inner": ()},
)  # fmt: skip
