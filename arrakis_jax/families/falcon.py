"""Falcon: LayerNorm, RoPE or ALiBi, multi-query or grouped-query attention, mostly in parallel."""

from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.families import rope
from arrakis_jax.families.base import HF_ACTIVATIONS, Family, norm_rules, per_head, rule

_DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_ln_in_parallel_attn": None,
    "layer_norm_epsilon": 1e-5,
    "num_kv_heads": None,
    "n_head_kv": None,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "max_position_embeddings": 2048,
    "ffn_hidden_size": None,
    "activation": "gelu",
    "tie_word_embeddings": True,
    **rope.ROTARY_DEFAULTS,
}


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    width, n_heads, inner = hf["hidden_size"], hf["num_attention_heads"], hf["ffn_hidden_size"]
    # Among the first checkpoints only those of the 40B have `n_head_kv`; their architecture is new.
    new = hf["new_decoder_architecture"] or hf["n_head_kv"] is not None
    n_kv_heads = hf["num_kv_heads"] if hf["n_head_kv"] is None else hf["n_head_kv"]
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    norms = hf["num_ln_in_parallel_attn"]
    if new and not hf["parallel_attn"]:
        must, do = "True with new_decoder_architecture", "it is not supported"
        raise ValueError(expected("parallel_attn", must, False, do))
    if norms not in ((None, 1, 2) if new else (None, 1)) and hf["parallel_attn"]:
        must = "1 or null, or 2 with new_decoder_architecture"
        raise ValueError(expected("num_ln_in_parallel_attn", must, norms, "check both"))
    if not (new or hf["multi_query"] or n_kv_heads == n_heads):
        must = "num_attention_heads or null without new_decoder_architecture and multi_query"
        raise ValueError(expected("num_kv_heads", must, n_kv_heads, "check them"))
    positions = (
        {"positions": "alibi", "falcon_alibi": True}
        if hf["alibi"]
        else {"positions": "rope", **rope.rope_arguments(hf)}
    )
    return {
        "n_layers": hf["num_hidden_layers"],
        "d_model": width,
        "n_heads": n_heads,
        "n_kv_heads": 1 if hf["multi_query"] and not new else n_kv_heads,
        "d_head": per_head(width, n_heads, "hidden_size"),
        "d_mlp": 4 * width if inner is None else inner,
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_epsilon"],
        **positions,
        "max_positions": hf["max_position_embeddings"],
        "qkv_bias": hf["bias"],
        "out_bias": hf["bias"],
        "parallel": hf["parallel_attn"],
        "shared_norm": hf["parallel_attn"] and not (new and norms != 1),
        "activation": hf["activation"],
        "mlp_bias": hf["bias"],
        "tied": hf["tie_word_embeddings"],
    }


_LAYER = "transformer.h.{l}."
_QKV = _LAYER + "self_attention.query_key_value."
# Two norms in parallel are `ln_attn` and `ln_mlp`; one norm, and the first of two in sequence, is
# `input_layernorm`. A group's R queries, its key and its value stand together, group after group.
_RULES = (
    rule("transformer.word_embeddings.weight", "V D -> V D", "w_e"),
    *norm_rules(_LAYER + "input_layernorm", "blocks.norm_attn"),
    *norm_rules(_LAYER + "ln_attn", "blocks.norm_attn"),
    rule(_QKV + "weight", "(G part K) D -> D G part K",
         "blocks.attn.w_q", "blocks.attn.w_k", "blocks.attn.w_v", sizes=("R", "1", "1")),
    rule(_QKV + "bias", "(G part K) -> G part K",
         "blocks.attn.b_q", "blocks.attn.b_k", "blocks.attn.b_v", sizes=("R", "1", "1")),
    rule(_LAYER + "self_attention.dense.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule(_LAYER + "self_attention.dense.bias", "D -> D", "blocks.attn.b_o"),
    *norm_rules(_LAYER + "post_attention_layernorm", "blocks.norm_mlp"),
    *norm_rules(_LAYER + "ln_mlp", "blocks.norm_mlp"),
    rule(_LAYER + "mlp.dense_h_to_4h.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule(_LAYER + "mlp.dense_h_to_4h.bias", "F -> F", "blocks.mlp.b_in"),
    rule(_LAYER + "mlp.dense_4h_to_h.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule(_LAYER + "mlp.dense_4h_to_h.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("transformer.ln_f", "norm_final"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)  # fmt: skip

FALCON = Family(
    name="falcon",
    aliases=("RefinedWeb", "RefinedWebModel"),
    defaults=_DEFAULTS,
    types={"num_ln_in_parallel_attn": int, "num_kv_heads": int, "n_head_kv": int,
           "ffn_hidden_size": int, **rope.ROTARY_TYPES},
    choices={"activation": HF_ACTIVATIONS},
    build=_arguments,
    rules=_RULES,
    prefix="transformer.",
    buffers=(r".*(rotary_emb|maybe_rotary)\.inv_freq",),
    renamed={
        "n_embed": "hidden_size", "n_head": "num_attention_heads", "n_layer": "num_hidden_layers",
    },
    ignored={
        "training": ("attention_dropout", "hidden_dropout"),
        "ffn_hidden_size, once more": ("ff_factor",),
    },
    only={"apply_residual_connection_post_layernorm": (False,)},
)  # fmt: skip
