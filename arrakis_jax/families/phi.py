"""Phi 1 to 2: LayerNorm, partial RoPE, attention and MLP in parallel on one norm, no gate."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def build(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ModelConfig."""
    llama = hf | {"rms_norm_eps": hf["layer_norm_eps"], "attention_bias": True, "mlp_bias": True}
    return decoder.build(llama) | {
        "norm": "layernorm",
        "qk_norm": "head" if hf["qk_layernorm"] else None,
        "qk_norm_bias": hf["qk_layernorm"],
        "parallel": True,
        "shared_norm": True,
        "gated": False,
        "unembed_bias": True,
    }


LAYER = decoder.LAYER
RULES = (
    rule("model.embed_tokens.weight", "V D -> V D", "w_e"),
    rule(LAYER + "input_layernorm.weight", "D -> D", "blocks.norm_attn.w"),
    rule(LAYER + "input_layernorm.bias", "D -> D", "blocks.norm_attn.b"),
    *decoder.QKV,
    rule(LAYER + "self_attn.dense.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
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

FAMILY = decoder.Decoder(
    name="phi",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 51200,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "hidden_act": "gelu_new",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "qk_layernorm": False,
        "partial_rotary_factor": 0.5,
    },
    build=build,
    rules=RULES,
    ignored={"training": ("resid_pdrop", "embd_pdrop", "attention_dropout")},
    only={},
)
