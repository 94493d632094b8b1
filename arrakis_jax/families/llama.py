"""Llama 1 to 3.3: pre-RMSNorm, RoPE, grouped queries, SwiGLU. HF: modeling_llama.py."""

from typing import Any

from arrakis_jax.families.base import Family, activation, rule
from arrakis_jax.families.rope import rope


def read(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields of LlamaConfig as those of ModelConfig."""
    heads = hf["num_attention_heads"]
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": hf["hidden_size"],
        "n_heads": heads,
        "n_kv_heads": heads if hf["num_key_value_heads"] is None else hf["num_key_value_heads"],
        "d_head": hf["hidden_size"] // heads if hf["head_dim"] is None else hf["head_dim"],
        "d_mlp": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "norm": "rmsnorm",
        "norm_eps": hf["rms_norm_eps"],
        "positions": "rope",
        "max_positions": hf["max_position_embeddings"],
        **rope(hf),
        "qkv_bias": hf["attention_bias"],
        "out_bias": hf["attention_bias"],
        "activation": activation(hf, "hidden_act"),
        "gated": True,
        "mlp_bias": hf["mlp_bias"],
        "tied": hf["tie_word_embeddings"],
    }


family = Family(
    name="llama",
    defaults={
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
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "rope_parameters": None,
        "attention_bias": False,
        "mlp_bias": False,
    },
    read=read,
    rules=(
        rule("model.embed_tokens.weight", "w_e", "V D -> V D"),
        rule("model.layers.{l}.input_layernorm.weight", "blocks.norm_attn.w", "D -> D"),
        rule("model.layers.{l}.self_attn.q_proj.weight", "blocks.attn.w_q", "(H K) D -> D H K"),
        rule("model.layers.{l}.self_attn.k_proj.weight", "blocks.attn.w_k", "(G K) D -> D G K"),
        rule("model.layers.{l}.self_attn.v_proj.weight", "blocks.attn.w_v", "(G K) D -> D G K"),
        rule("model.layers.{l}.self_attn.o_proj.weight", "blocks.attn.w_o", "D (H K) -> H K D"),
        rule("model.layers.{l}.self_attn.q_proj.bias", "blocks.attn.b_q", "(H K) -> H K"),
        rule("model.layers.{l}.self_attn.k_proj.bias", "blocks.attn.b_k", "(G K) -> G K"),
        rule("model.layers.{l}.self_attn.v_proj.bias", "blocks.attn.b_v", "(G K) -> G K"),
        rule("model.layers.{l}.self_attn.o_proj.bias", "blocks.attn.b_o", "D -> D"),
        rule("model.layers.{l}.post_attention_layernorm.weight", "blocks.norm_mlp.w", "D -> D"),
        rule("model.layers.{l}.mlp.gate_proj.weight", "blocks.mlp.w_gate", "F D -> D F"),
        rule("model.layers.{l}.mlp.up_proj.weight", "blocks.mlp.w_in", "F D -> D F"),
        rule("model.layers.{l}.mlp.down_proj.weight", "blocks.mlp.w_out", "D F -> F D"),
        rule("model.layers.{l}.mlp.gate_proj.bias", "blocks.mlp.b_gate", "F -> F"),
        rule("model.layers.{l}.mlp.up_proj.bias", "blocks.mlp.b_in", "F -> F"),
        rule("model.layers.{l}.mlp.down_proj.bias", "blocks.mlp.b_out", "D -> D"),
        rule("model.norm.weight", "norm_final.w", "D -> D"),
        rule("lm_head.weight", "w_u", "V D -> D V"),
    ),
    # pretraining_tp splits products to repeat the rounding of training; max_sequence_length is an
    # old name that nothing reads.
    ignored=frozenset("attention_dropout pretraining_tp max_sequence_length".split()),
    buffers=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
