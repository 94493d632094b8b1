"""Phi 1 to 2: LayerNorm, partial RoPE, attention and MLP in parallel on one norm, no gate."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import norm_rules, rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    # The names under which Llama's function reads these; biases are everywhere.
    llama = hf | {"rms_norm_eps": hf["layer_norm_eps"], "attention_bias": True, "mlp_bias": True}
    return decoder.llama_arguments(llama) | {
        "norm": "layernorm",
        "qk_norm": "head" if hf["qk_layernorm"] else None,
        "qk_norm_bias": hf["qk_layernorm"],
        "parallel": True,
        "shared_norm": True,
        "gated": False,
        "unembed_bias": True,
    }


_LAYER = decoder.LAYER
_RULES = (
    rule("model.embed_tokens.weight", "V D -> V D", "w_e"),
    *norm_rules(_LAYER + "input_layernorm", "blocks.norm_attn"),
    *decoder.QKV_RULES,
    rule(_LAYER + "self_attn.dense.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(_LAYER + "self_attn.dense.bias", "D -> D", "blocks.attn.b_o"),
    rule(_LAYER + "self_attn.q_layernorm.weight", "K -> K", "blocks.attn.norm_q.w"),
    rule(_LAYER + "self_attn.q_layernorm.bias", "K -> K", "blocks.attn.norm_q.b"),
    rule(_LAYER + "self_attn.k_layernorm.weight", "K -> K", "blocks.attn.norm_k.w"),
    rule(_LAYER + "self_attn.k_layernorm.bias", "K -> K", "blocks.attn.norm_k.b"),
    rule(_LAYER + "mlp.fc1.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(_LAYER + "mlp.fc1.bias", "F -> F", "blocks.mlp.b_in"),
    rule(_LAYER + "mlp.fc2.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(_LAYER + "mlp.fc2.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("model.final_layernorm", "norm_final"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
    rule("lm_head.bias", "V -> V", "b_u"),
)

PHI = decoder.Decoder(
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
    build=_arguments,
    rules=_RULES,
    ignored={"training": ("resid_pdrop", "embd_pdrop", "attention_dropout")},
    only={},
)
