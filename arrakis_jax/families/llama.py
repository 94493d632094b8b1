"""Llama 1 to 3.3: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

from typing import Any

from arrakis_jax.families import rope
from arrakis_jax.families.base import ACTIVATIONS, Family, per_head, rule

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    **rope.DEFAULTS,
}


def build(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ModelConfig."""
    width, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    n_kv_heads, d_head = hf["num_key_value_heads"], hf["head_dim"]
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": width,
        "n_heads": n_heads,
        "n_kv_heads": n_heads if n_kv_heads is None else n_kv_heads,
        "d_head": per_head(width, n_heads, "hidden_size") if d_head is None else d_head,
        "d_mlp": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "norm": "rmsnorm",
        "norm_eps": hf["rms_norm_eps"],
        "positions": "rope",
        "max_positions": hf["max_position_embeddings"],
        **rope.rope(hf),
        "qkv_bias": hf["attention_bias"],
        "out_bias": hf["attention_bias"],
        "activation": hf["hidden_act"],
        "gated": True,
        "mlp_bias": hf["mlp_bias"],
        "tied": hf["tie_word_embeddings"],
    }


RULES = (
    rule("model.embed_tokens.weight", "V D -> V D", "w_e"),
    rule("model.layers.{l}.input_layernorm.weight", "D -> D", "blocks.norm_attn.w"),
    rule("model.layers.{l}.self_attn.q_proj.weight", "(H K) D -> D H K", "blocks.attn.w_q"),
    rule("model.layers.{l}.self_attn.k_proj.weight", "(G K) D -> D G K", "blocks.attn.w_k"),
    rule("model.layers.{l}.self_attn.v_proj.weight", "(G K) D -> D G K", "blocks.attn.w_v"),
    rule("model.layers.{l}.self_attn.o_proj.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule("model.layers.{l}.self_attn.q_proj.bias", "(H K) -> H K", "blocks.attn.b_q"),
    rule("model.layers.{l}.self_attn.k_proj.bias", "(G K) -> G K", "blocks.attn.b_k"),
    rule("model.layers.{l}.self_attn.v_proj.bias", "(G K) -> G K", "blocks.attn.b_v"),
    rule("model.layers.{l}.self_attn.o_proj.bias", "D -> D", "blocks.attn.b_o"),
    rule("model.layers.{l}.post_attention_layernorm.weight", "D -> D", "blocks.norm_mlp.w"),
    rule("model.layers.{l}.mlp.gate_proj.weight", "F D -> D F", "blocks.mlp.w_gate"),
    rule("model.layers.{l}.mlp.up_proj.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule("model.layers.{l}.mlp.down_proj.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule("model.layers.{l}.mlp.gate_proj.bias", "F -> F", "blocks.mlp.b_gate"),
    rule("model.layers.{l}.mlp.up_proj.bias", "F -> F", "blocks.mlp.b_in"),
    rule("model.layers.{l}.mlp.down_proj.bias", "D -> D", "blocks.mlp.b_out"),
    rule("model.norm.weight", "D -> D", "norm_final.w"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)

FAMILY = Family(
    name="llama",
    defaults=DEFAULTS,
    types={"num_key_value_heads": int, "head_dim": int, **rope.TYPES},
    choices={"hidden_act": ACTIVATIONS},
    build=build,
    rules=RULES,
    prefix="model.",
    buffers=(r".*rotary_emb\.inv_freq",),
    ignored={
        "training": ("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop"),
        "how the products are split over devices": ("pretraining_tp",),
        "the name of a converter's format": ("is_llama_config",),
    },
    only={"partial_rotary_factor": (1,), "rope_interleaved": (False,)},
)
