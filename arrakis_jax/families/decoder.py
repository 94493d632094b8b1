"""What the families in the shape of Llama share: config fields, their meaning, and weights.

This module defines no family. A family in this shape is a `Decoder`: what its own table leaves out
is as in Llama.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.families import rope
from arrakis_jax.families.base import HF_ACTIVATIONS, Family, Rule, per_head, rule

# Fields of every family, with Llama's defaults. `head_dim` is read for every family, although not
# every class of Hugging Face has it.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    **rope.ROTARY_DEFAULTS,
}
TYPES = {
    "num_key_value_heads": int,
    "head_dim": int,
    "sliding_window": int,
    "layer_types": list,
    **rope.ROTARY_TYPES,
}
LAYER_TYPES = {"full_attention": False, "attention": False, "sliding_attention": True}


def llama_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ModelConfig for Llama.

    Reads the fields of `DEFAULTS`, `hidden_act`, `rms_norm_eps` and, where a family has them,
    `attention_bias` and `mlp_bias`. A family with other names for these passes its values under
    these names.
    """
    width, n_heads = hf["hidden_size"], hf["num_attention_heads"]
    n_kv_heads, d_head = hf["num_key_value_heads"], hf["head_dim"]
    bias = hf.get("attention_bias", False)
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
        **rope.rope_arguments(hf),
        "qkv_bias": bias,
        "out_bias": bias,
        "activation": hf["hidden_act"],
        "gated": True,
        "mlp_bias": hf.get("mlp_bias", False),
        "tied": hf["tie_word_embeddings"],
    }


def windows(hf: dict[str, Any], slides: Callable[[int], bool]) -> dict[str, Any]:
    """`window` and `window_layers`, by `layer_types` or, where that is absent, by a rule.

    Args:
        hf: the values of the fields; `sliding_window` is the width.
        slides: whether a layer has a window, for configs without `layer_types`.
    """
    n_layers, kinds = hf["num_hidden_layers"], hf["layer_types"]
    if kinds is None:
        layers = tuple(slides(layer) for layer in range(n_layers))
    elif len(kinds) != n_layers or not all(str(kind) in LAYER_TYPES for kind in kinds):
        must = f"{n_layers} of {tuple(LAYER_TYPES)}, one for each layer"
        raise ValueError(expected("layer_types", must, kinds, "others are not supported"))
    else:
        layers = tuple(LAYER_TYPES[kind] for kind in kinds)
    if not any(layers):
        return {}
    if hf["sliding_window"] is None:
        must, do = "an int, as layers have a window", "set it, or give them 'full_attention'"
        raise ValueError(expected("sliding_window", must, None, do))
    return {"window": hf["sliding_window"], "window_layers": None if all(layers) else layers}


def positive(hf: dict[str, Any], name: str) -> Any:
    """The value of a field that must be positive; ValueError if it is not."""
    if hf[name] > 0:
        return hf[name]
    raise ValueError(expected(name, "> 0", hf[name], "correct it"))


LAYER = "model.layers.{l}."
END_RULES = (
    rule("model.embed_tokens.weight", "V D -> V D", "w_e"),
    rule("model.norm.weight", "D -> D", "norm_final.w"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)
QKV_RULES = (
    rule(LAYER + "self_attn.q_proj.weight", "(H K) D -> D H K", "blocks.attn.w_q"),
    rule(LAYER + "self_attn.k_proj.weight", "(G K) D -> D G K", "blocks.attn.w_k"),
    rule(LAYER + "self_attn.v_proj.weight", "(G K) D -> D G K", "blocks.attn.w_v"),
    rule(LAYER + "self_attn.q_proj.bias", "(H K) -> H K", "blocks.attn.b_q"),
    rule(LAYER + "self_attn.k_proj.bias", "(G K) -> G K", "blocks.attn.b_k"),
    rule(LAYER + "self_attn.v_proj.bias", "(G K) -> G K", "blocks.attn.b_v"),
)
ATTENTION_RULES = (
    *QKV_RULES,
    rule(LAYER + "self_attn.o_proj.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(LAYER + "self_attn.o_proj.bias", "D -> D", "blocks.attn.b_o"),
)
# Llama's norms; their biases, where a family has LayerNorms; and the norms of queries and keys,
# where every head has the same gain.
NORM_RULES = (
    rule(LAYER + "input_layernorm.weight", "D -> D", "blocks.norm_attn.w"),
    rule(LAYER + "post_attention_layernorm.weight", "D -> D", "blocks.norm_mlp.w"),
)
NORM_BIAS_RULES = (
    rule("model.norm.bias", "D -> D", "norm_final.b"),
    rule(LAYER + "input_layernorm.bias", "D -> D", "blocks.norm_attn.b"),
    rule(LAYER + "post_attention_layernorm.bias", "D -> D", "blocks.norm_mlp.b"),
)
QK_NORM_RULES = (
    rule(LAYER + "self_attn.q_norm.weight", "K -> K", "blocks.attn.norm_q.w"),
    rule(LAYER + "self_attn.k_norm.weight", "K -> K", "blocks.attn.norm_k.w"),
)
MLP_RULES = (
    rule(LAYER + "mlp.gate_proj.weight", "F D -> D F", "blocks.mlp.w_gate"),
    rule(LAYER + "mlp.up_proj.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(LAYER + "mlp.down_proj.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(LAYER + "mlp.gate_proj.bias", "F -> F", "blocks.mlp.b_gate"),
    rule(LAYER + "mlp.up_proj.bias", "F -> F", "blocks.mlp.b_in"),
    rule(LAYER + "mlp.down_proj.bias", "D -> D", "blocks.mlp.b_out"),
)
# The router, and all experts as one tensor, as transformers 5 holds them in memory. Older files
# have a tensor for each expert.
EXPERT_RULES = (
    rule(LAYER + "mlp.gate.weight", "E D -> D E", "blocks.moe.w_router"),
    rule(LAYER + "mlp.experts.gate_up_proj", "E (part J) D -> part E D J",
         "blocks.moe.w_gate", "blocks.moe.w_in"),
    rule(LAYER + "mlp.experts.down_proj", "E D J -> E J D", "blocks.moe.w_out"),
)  # fmt: skip
LLAMA_RULES = (*END_RULES, *ATTENTION_RULES, *NORM_RULES, *MLP_RULES)
IGNORED = {
    "training": ("attention_dropout",),
    "how the products are split over devices": ("pretraining_tp",),
}
IGNORED_OF_EXPERTS = IGNORED | {
    "training of the router": ("router_aux_loss_coef", "router_jitter_noise"),
    "what is returned": ("output_router_logits",),
}
ONLY = {"partial_rotary_factor": (1,)}
NULLABLE = ("num_key_value_heads", "sliding_window")


@dataclass(frozen=True, kw_only=True)
class Decoder(Family):
    """A family in the shape of Llama."""

    build: Callable[[dict[str, Any]], dict[str, Any]] = llama_arguments
    rules: tuple[Rule, ...] = LLAMA_RULES
    prefix: str = "model."
    types: Mapping[str, type] = field(default_factory=lambda: TYPES)
    choices: Mapping[str, Mapping[str, str]] = field(
        default_factory=lambda: {"hidden_act": HF_ACTIVATIONS}
    )
    buffers: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    ignored: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: IGNORED)
    only: Mapping[str, tuple] = field(default_factory=lambda: ONLY)
    nullable: tuple[str, ...] = NULLABLE
