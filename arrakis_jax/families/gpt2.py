"""GPT-2: LayerNorm, learned positions, biases everywhere, tied embeddings."""

from typing import Any

from arrakis_jax.families.base import HF_ACTIVATIONS, Family, norm_rules, per_head, rule

_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    width = hf["n_embd"]
    return {
        "n_layers": hf["n_layer"],
        "d_model": width,
        "n_heads": hf["n_head"],
        "n_kv_heads": hf["n_head"],
        "d_head": per_head(width, hf["n_head"], "n_embd"),
        "d_mlp": 4 * width if hf["n_inner"] is None else hf["n_inner"],
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "positions": "learned",
        "max_positions": hf["n_positions"],
        "attention_scale": None if hf["scale_attn_weights"] else 1.0,
        "scale_by_inverse_layer": hf["scale_attn_by_inverse_layer_idx"],
        "qkv_bias": True,
        "out_bias": True,
        "activation": hf["activation_function"],
        "mlp_bias": True,
        "tied": hf["tie_word_embeddings"],
    }


# Conv1D stores [in, out]: nothing is transposed but the unembedding.
_RULES = (
    rule("transformer.wte.weight", "V D -> V D", "w_e"),
    rule("transformer.wpe.weight", "N D -> N D", "w_pos"),
    *norm_rules("transformer.h.{l}.ln_1", "blocks.norm_attn"),
    rule("transformer.h.{l}.attn.c_attn.weight", "D (part H K) -> part D H K",
         "blocks.attn.w_q", "blocks.attn.w_k", "blocks.attn.w_v"),
    rule("transformer.h.{l}.attn.c_attn.bias", "(part H K) -> part H K",
         "blocks.attn.b_q", "blocks.attn.b_k", "blocks.attn.b_v"),
    rule("transformer.h.{l}.attn.c_proj.weight", "(H K) D -> H K D", "blocks.attn.w_o"),
    rule("transformer.h.{l}.attn.c_proj.bias", "D -> D", "blocks.attn.b_o"),
    *norm_rules("transformer.h.{l}.ln_2", "blocks.norm_mlp"),
    rule("transformer.h.{l}.mlp.c_fc.weight", "D F -> D F", "blocks.mlp.w_in"),
    rule("transformer.h.{l}.mlp.c_fc.bias", "F -> F", "blocks.mlp.b_in"),
    rule("transformer.h.{l}.mlp.c_proj.weight", "F D -> F D", "blocks.mlp.w_out"),
    rule("transformer.h.{l}.mlp.c_proj.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("transformer.ln_f", "norm_final"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)  # fmt: skip

GPT2 = Family(
    name="gpt2",
    defaults=_DEFAULTS,
    types={"n_inner": int},
    choices={"activation_function": HF_ACTIVATIONS},
    build=_arguments,
    rules=_RULES,
    prefix="transformer.",
    buffers=(r".*\.attn\.(bias|masked_bias)",),
    renamed={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored={
        "training": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "a head for classification": (
            "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
            "summary_first_dropout", "predict_special_tokens",
        ),
        "the same in exact arithmetic": ("reorder_and_upcast_attn",),
        "n_positions under an older name": ("n_ctx",),
        "what old versions returned": ("output_past",),
    },
)  # fmt: skip
