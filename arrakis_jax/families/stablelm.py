"""StableLM: LayerNorm, partial RoPE, grouped-query attention, SwiGLU, optionally in parallel."""

from typing import Any

from arrakis_jax.families import rope
from arrakis_jax.families.base import ACTIVATIONS, Family, per_head, rule

DEFAULTS = {
    "vocab_size": 50304,
    "intermediate_size": 6912,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
    **rope.DEFAULTS,
    "partial_rotary_factor": 0.25,
}


def build(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ModelConfig."""
    width, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": width,
        "n_heads": n_heads,
        "n_kv_heads": hf["num_key_value_heads"],
        "d_head": per_head(width, n_heads, "hidden_size"),
        "d_mlp": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_eps"],
        "positions": "rope",
        "max_positions": hf["max_position_embeddings"],
        **rope.rope(hf),
        "qk_norm": "each_head" if hf["qk_layernorm"] else None,
        "qkv_bias": hf["use_qkv_bias"],
        "parallel": hf["use_parallel_residual"],
        "shared_norm": hf["use_parallel_residual"],
        "activation": hf["hidden_act"],
        "gated": True,
        "tied": hf["tie_word_embeddings"],
    }


LAYER = "model.layers.{l}."
RULES = (
    rule("model.embed_tokens.weight", "V D -> V D", "w_e"),
    rule(LAYER + "input_layernorm.weight", "D -> D", "blocks.norm_attn.w"),
    rule(LAYER + "input_layernorm.bias", "D -> D", "blocks.norm_attn.b"),
    rule(LAYER + "self_attn.q_proj.weight", "(H K) D -> D H K", "blocks.attn.w_q"),
    rule(LAYER + "self_attn.k_proj.weight", "(G K) D -> D G K", "blocks.attn.w_k"),
    rule(LAYER + "self_attn.v_proj.weight", "(G K) D -> D G K", "blocks.attn.w_v"),
    rule(LAYER + "self_attn.o_proj.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(LAYER + "self_attn.q_proj.bias", "(H K) -> H K", "blocks.attn.b_q"),
    rule(LAYER + "self_attn.k_proj.bias", "(G K) -> G K", "blocks.attn.b_k"),
    rule(LAYER + "self_attn.v_proj.bias", "(G K) -> G K", "blocks.attn.b_v"),
    rule(LAYER + "self_attn.q_layernorm.norms.{H}.weight", "K -> K", "blocks.attn.norm_q.w"),
    rule(LAYER + "self_attn.k_layernorm.norms.{G}.weight", "K -> K", "blocks.attn.norm_k.w"),
    rule(LAYER + "post_attention_layernorm.weight", "D -> D", "blocks.norm_mlp.w"),
    rule(LAYER + "post_attention_layernorm.bias", "D -> D", "blocks.norm_mlp.b"),
    rule(LAYER + "mlp.gate_proj.weight", "F D -> D F", "blocks.mlp.w_gate"),
    rule(LAYER + "mlp.up_proj.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(LAYER + "mlp.down_proj.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule("model.norm.weight", "D -> D", "norm_final.w"),
    rule("model.norm.bias", "D -> D", "norm_final.b"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)

FAMILY = Family(
    name="stablelm",
    defaults=DEFAULTS,
    types=rope.TYPES,
    choices={"hidden_act": ACTIVATIONS},
    build=build,
    rules=RULES,
    prefix="model.",
    buffers=(r".*rotary_emb\.inv_freq",),
    ignored={
        "training": ("attention_dropout", "hidden_dropout"),
        "num_attention_heads, once more": ("num_heads",),
    },
)
