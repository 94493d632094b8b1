"""GPT-2: pre-LayerNorm, learned positions, biases everywhere, tied. HF: modeling_gpt2.py."""

from typing import Any

from arrakis_jax.families.base import Family, activation, rule


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of GPT2Config as those of ModelConfig."""
    return {
        "n_layers": hf["n_layer"],
        "d_model": hf["n_embd"],
        "n_heads": hf["n_head"],
        "n_kv_heads": hf["n_head"],
        "d_head": hf["n_embd"] // hf["n_head"],
        "d_mlp": 4 * hf["n_embd"] if hf["n_inner"] is None else hf["n_inner"],
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "positions": "learned",
        "max_positions": hf["n_positions"],
        "attention_scale": None if hf["scale_attn_weights"] else 1.0,
        "scale_by_inverse_layer": hf["scale_attn_by_inverse_layer_idx"],
        "qkv_bias": True,
        "out_bias": True,
        "activation": activation(hf, "activation_function"),
        "mlp_bias": True,
        "tied": hf["tie_word_embeddings"],
    }


family = Family(
    name="gpt2",
    defaults={
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
    },
    read=read,
    # Conv1D weights are stored [in, out].
    rules=(
        rule("transformer.wte.weight", "w_e", "V D -> V D"),
        rule("transformer.wpe.weight", "w_pos", "P D -> P D"),
        rule("transformer.h.{l}.ln_1.weight", "blocks.norm_attn.w", "D -> D"),
        rule("transformer.h.{l}.ln_1.bias", "blocks.norm_attn.b", "D -> D"),
        rule(
            "transformer.h.{l}.attn.c_attn.weight",
            "blocks.attn.w_q blocks.attn.w_k blocks.attn.w_v",
            "D (parts H K) -> parts D H K",
        ),
        rule(
            "transformer.h.{l}.attn.c_attn.bias",
            "blocks.attn.b_q blocks.attn.b_k blocks.attn.b_v",
            "(parts H K) -> parts H K",
        ),
        rule("transformer.h.{l}.attn.c_proj.weight", "blocks.attn.w_o", "(H K) D -> H K D"),
        rule("transformer.h.{l}.attn.c_proj.bias", "blocks.attn.b_o", "D -> D"),
        rule("transformer.h.{l}.ln_2.weight", "blocks.norm_mlp.w", "D -> D"),
        rule("transformer.h.{l}.ln_2.bias", "blocks.norm_mlp.b", "D -> D"),
        rule("transformer.h.{l}.mlp.c_fc.weight", "blocks.mlp.w_in", "D F -> D F"),
        rule("transformer.h.{l}.mlp.c_fc.bias", "blocks.mlp.b_in", "F -> F"),
        rule("transformer.h.{l}.mlp.c_proj.weight", "blocks.mlp.w_out", "F D -> F D"),
        rule("transformer.h.{l}.mlp.c_proj.bias", "blocks.mlp.b_out", "D -> D"),
        rule("transformer.ln_f.weight", "norm_final.w", "D -> D"),
        rule("transformer.ln_f.bias", "norm_final.b", "D -> D"),
        rule("lm_head.weight", "w_u", "V D -> D V"),
    ),
    # Dropout; heads for other tasks; reorder_and_upcast_attn only chooses the dtype of scores.
    ignored=frozenset(
        "resid_pdrop embd_pdrop attn_pdrop summary_type summary_use_proj summary_activation "
        "summary_proj_to_labels summary_first_dropout reorder_and_upcast_attn n_ctx".split()
    ),
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    prefix="transformer.",
    buffers=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
