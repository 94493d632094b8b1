"""Phi 1 to 2: LayerNorm, partial RoPE, attention and MLP in parallel on one norm."""

from typing import Any

from arrakis_jax.families import rope
from arrakis_jax.families.base import ACTIVATIONS, Family, per_head, rule

DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "qk_layernorm": False,
    **rope.DEFAULTS,
    "partial_rotary_factor": 0.5,
}


def build(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ModelConfig."""
    width, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    n_kv_heads = hf["num_key_value_heads"]
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": width,
        "n_heads": n_heads,
        "n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads,
        "d_head": per_head(width, n_heads, "hidden_size"),
        "d_mlp": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_eps"],
        "positions": "rope",
        "max_positions": hf["max_position_embeddings"],
        **rope.rope(hf),
        "qk_norm": "head" if hf["qk_layernorm"] else None,
        "qk_norm_bias": hf["qk_layernorm"],
        "qkv_bias": True,
        "out_bias": True,
        "parallel": True,
        "shared_norm": True,
        "activation": hf["hidden_act"],
        "mlp_bias": True,
        "tied": hf["tie_word_embeddings"],
        "unembed_bias": True,
    }


LAYER = "model.layers.{l}."
RULES = (
    rule("model.embed_tokens.weight", "V D -> V D", "w_e"),
    rule(LAYER + "input_layernorm.weight", "D -> D", "blocks.norm_attn.w"),
    rule(LAYER + "input_layernorm.bias", "D -> D", "blocks.norm_attn.b"),
    rule(LAYER + "self_attn.q_proj.weight", "(H K) D -> D H K", "blocks.attn.w_q"),
    rule(LAYER + "self_attn.k_proj.weight", "(G K) D -> D G K", "blocks.attn.w_k"),
    rule(LAYER + "self_attn.v_proj.weight", "(G K) D -> D G K", "blocks.attn.w_v"),
    rule(LAYER + "self_attn.dense.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(LAYER + "self_attn.q_proj.bias", "(H K) -> H K", "blocks.attn.b_q"),
    rule(LAYER + "self_attn.k_proj.bias", "(G K) -> G K", "blocks.attn.b_k"),
    rule(LAYER + "self_attn.v_proj.bias", "(G K) -> G K", "blocks.attn.b_v"),
    rule(LAYER + "self_attn.dense.bias", "D -> D", "blocks.attn.b_o"),
    rule(LAYER + "self_attn.q_layernorm.weight", "K -> K", "blocks.attn.norm_q.w"),
    rule(LAYER + "self_attn.q_layernorm.bias", "K -> K", "blocks.attn.norm_q.b"),
    rule(LAYER + "self_attn.k_layernorm.weight", "K -> K", "blocks.attn.norm_k.w"),
    rule(LAYER + "self_attn.k_layernorm.bias", "K -> K", "blocks.attn.norm_k.b"),
    rule(LAYER + "mlp.fc1.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(LAYER + "mlp.fc1.bias", "F -> F", "blocks.mlp.b_in"),
    rule(LAYER + "mlp.fc2.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(LAYER + "mlp.fc2.bias", "D -> D", "blocks.mlp.b_out"),
    rule("model.final_layernorm.weight", "D -> D", "norm_final.w"),
    rule("model.final_layernorm.bias", "D -> D", "norm_final.b"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
    rule("lm_head.bias", "V -> V", "b_u"),
)

FAMILY = Family(
    name="phi",
    defaults=DEFAULTS,
    types={"num_key_value_heads": int, **rope.TYPES},
    choices={"hidden_act": ACTIVATIONS},
    build=build,
    rules=RULES,
    prefix="model.",
    buffers=(r".*rotary_emb\.inv_freq",),
    ignored={"training": ("resid_pdrop", "embd_pdrop", "attention_dropout")},
)
