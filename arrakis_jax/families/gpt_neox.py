"""GPT-NeoX and Pythia: LayerNorm, partial RoPE, attention and MLP in parallel with a norm each."""

from typing import Any

from arrakis_jax.families import rope
from arrakis_jax.families.base import HF_ACTIVATIONS, Family, norm_rules, per_head, rule

_DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
    **rope.ROTARY_DEFAULTS,
    "partial_rotary_factor": 0.25,
}


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    width, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": width,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": per_head(width, n_heads, "hidden_size"),
        "d_mlp": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_eps"],
        "positions": "rope",
        "max_positions": hf["max_position_embeddings"],
        **rope.rope_arguments(hf),
        "qkv_bias": hf["attention_bias"],
        "out_bias": hf["attention_bias"],
        "parallel": hf["use_parallel_residual"],
        "activation": hf["hidden_act"],
        "mlp_bias": True,
        "tied": hf["tie_word_embeddings"],
    }


# Each head's query, key and value stand together, head after head.
_LAYER = "gpt_neox.layers.{l}."
_RULES = (
    rule("gpt_neox.embed_in.weight", "V D -> V D", "w_e"),
    *norm_rules(_LAYER + "input_layernorm", "blocks.norm_attn"),
    rule(_LAYER + "attention.query_key_value.weight", "(H part K) D -> part D H K",
         "blocks.attn.w_q", "blocks.attn.w_k", "blocks.attn.w_v"),
    rule(_LAYER + "attention.query_key_value.bias", "(H part K) -> part H K",
         "blocks.attn.b_q", "blocks.attn.b_k", "blocks.attn.b_v"),
    rule(_LAYER + "attention.dense.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(_LAYER + "attention.dense.bias", "D -> D", "blocks.attn.b_o"),
    *norm_rules(_LAYER + "post_attention_layernorm", "blocks.norm_mlp"),
    rule(_LAYER + "mlp.dense_h_to_4h.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(_LAYER + "mlp.dense_h_to_4h.bias", "F -> F", "blocks.mlp.b_in"),
    rule(_LAYER + "mlp.dense_4h_to_h.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(_LAYER + "mlp.dense_4h_to_h.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("gpt_neox.final_layer_norm", "norm_final"),
    # Checkpoints have either name.
    rule("embed_out.weight", "V D -> D V", "w_u"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)  # fmt: skip

GPT_NEOX = Family(
    name="gpt_neox",
    defaults=_DEFAULTS,
    types=rope.ROTARY_TYPES,
    choices={"hidden_act": HF_ACTIVATIONS},
    build=_arguments,
    rules=_RULES,
    prefix="gpt_neox.",
    buffers=(r".*\.attention\.(bias|masked_bias)", r".*rotary_emb\.inv_freq"),
    renamed={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    ignored={
        "training": (
            "attention_dropout", "hidden_dropout", "attention_probs_dropout_prob",
            "hidden_dropout_prob",
        ),
        "a head for classification": ("classifier_dropout",),
    },
)  # fmt: skip
