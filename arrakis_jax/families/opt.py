"""OPT: LayerNorm (in OPT-350m on the stream itself), learned positions from the third row on."""

from typing import Any

from arrakis_jax.families.base import HF_ACTIVATIONS, Family, norm_rules, per_head, rule

_DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    width, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    before, narrow = hf["do_layer_norm_before"], hf["word_embed_proj_dim"]
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": width,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "d_head": per_head(width, n_heads, "hidden_size"),
        "d_mlp": hf["ffn_dim"],
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "norm_gain": hf["layer_norm_elementwise_affine"],
        "norm_bias": hf["layer_norm_elementwise_affine"],
        "norm_placement": "pre" if before else "stream_after",
        # With norms on the stream itself, the last block's norm is the last one.
        "final_norm": before and not hf["_remove_final_layer_norm"],
        "positions": "learned",
        "max_positions": hf["max_position_embeddings"],
        # The table begins with two rows that no position uses.
        "position_offset": 2,
        "qkv_bias": hf["enable_bias"],
        "out_bias": hf["enable_bias"],
        "activation": hf["activation_function"],
        "mlp_bias": hf["enable_bias"],
        "d_embed": None if narrow == width else narrow,
        "tied": hf["tie_word_embeddings"],
    }


# A layer's `final_layer_norm` is the norm of its MLP's input; the decoder's is the final norm.
_LAYER = "model.decoder.layers.{l}."
_RULES = (
    rule("model.decoder.embed_tokens.weight", "V M -> V M", "w_e"),
    rule("model.decoder.embed_positions.weight", "N D -> N D", "w_pos"),
    rule("model.decoder.project_in.weight", "D M -> M D", "w_project_in"),
    *norm_rules(_LAYER + "self_attn_layer_norm", "blocks.norm_attn"),
    rule(_LAYER + "self_attn.q_proj.weight", "(H K) D -> D H K", "blocks.attn.w_q"),
    rule(_LAYER + "self_attn.k_proj.weight", "(G K) D -> D G K", "blocks.attn.w_k"),
    rule(_LAYER + "self_attn.v_proj.weight", "(G K) D -> D G K", "blocks.attn.w_v"),
    rule(_LAYER + "self_attn.out_proj.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(_LAYER + "self_attn.q_proj.bias", "(H K) -> H K", "blocks.attn.b_q"),
    rule(_LAYER + "self_attn.k_proj.bias", "(G K) -> G K", "blocks.attn.b_k"),
    rule(_LAYER + "self_attn.v_proj.bias", "(G K) -> G K", "blocks.attn.b_v"),
    rule(_LAYER + "self_attn.out_proj.bias", "D -> D", "blocks.attn.b_o"),
    *norm_rules(_LAYER + "final_layer_norm", "blocks.norm_mlp"),
    rule(_LAYER + "fc1.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(_LAYER + "fc1.bias", "F -> F", "blocks.mlp.b_in"),
    rule(_LAYER + "fc2.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(_LAYER + "fc2.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("model.decoder.final_layer_norm", "norm_final"),
    rule("model.decoder.project_out.weight", "M D -> D M", "w_project_out"),
    rule("lm_head.weight", "V M -> M V", "w_u"),
)

OPT = Family(
    name="opt",
    defaults=_DEFAULTS,
    types={"word_embed_proj_dim": int},
    choices={"activation_function": HF_ACTIVATIONS},
    build=_arguments,
    rules=_RULES,
    prefix="model.",
    ignored={
        "training": (
            "dropout", "attention_dropout", "activation_dropout", "layerdrop", "init_std",
        ),
    },
)  # fmt: skip
