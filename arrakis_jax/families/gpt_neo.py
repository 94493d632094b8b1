"""GPT-Neo: LayerNorm, learned positions, products of queries and keys not scaled, local layers."""

from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.families.base import HF_ACTIVATIONS, Family, norm_rules, per_head, rule

_DEFAULTS = {
    "vocab_size": 50257,
    "max_position_embeddings": 2048,
    "hidden_size": 2048,
    "num_layers": 24,
    "attention_types": None,
    "attention_layers": None,
    "num_heads": 16,
    "intermediate_size": None,
    "window_size": 256,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
_KINDS = ("global", "local")


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    width, inner = hf["hidden_size"], hf["intermediate_size"]
    local = tuple(kind == "local" for kind in _kinds(hf))
    return {
        "n_layers": hf["num_layers"],
        "d_model": width,
        "n_heads": hf["num_heads"],
        "n_kv_heads": hf["num_heads"],
        "d_head": per_head(width, hf["num_heads"], "hidden_size"),
        "d_mlp": 4 * width if inner is None else inner,
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "positions": "learned",
        "max_positions": hf["max_position_embeddings"],
        "window": hf["window_size"] if any(local) else None,
        "window_layers": local if any(local) else None,
        # Not divided by the root of the head's width. Only the output has a bias.
        "attention_scale": 1.0,
        "out_bias": True,
        "activation": hf["activation_function"],
        "mlp_bias": True,
        "tied": hf["tie_word_embeddings"],
    }


def _kinds(hf: dict[str, Any]) -> list[str]:
    """The kind of each layer: as listed, or from [[kinds, how often], ...]."""
    layers = hf["attention_layers"]
    if layers is None:
        runs = hf["attention_types"] or [[["global", "local"], 12]]
        layers: Any = runs
        try:
            if sum(times * len(kinds) for kinds, times in runs) == hf["num_layers"]:
                layers = [kind for kinds, times in runs for _ in range(times) for kind in kinds]
        except (TypeError, ValueError):
            pass  # not pairs of kinds and a number: refused below
    if len(layers) != hf["num_layers"] or not all(kind in _KINDS for kind in layers):
        name = "attention_types" if hf["attention_layers"] is None else "attention_layers"
        must = f"'global' or 'local' for each of {hf['num_layers']} layers"
        raise ValueError(expected(name, must, layers, "give as many as num_layers"))
    return layers


_RULES = (
    rule("transformer.wte.weight", "V D -> V D", "w_e"),
    rule("transformer.wpe.weight", "N D -> N D", "w_pos"),
    *norm_rules("transformer.h.{l}.ln_1", "blocks.norm_attn"),
    rule("transformer.h.{l}.attn.attention.q_proj.weight", "(H K) D -> D H K", "blocks.attn.w_q"),
    rule("transformer.h.{l}.attn.attention.k_proj.weight", "(G K) D -> D G K", "blocks.attn.w_k"),
    rule("transformer.h.{l}.attn.attention.v_proj.weight", "(G K) D -> D G K", "blocks.attn.w_v"),
    rule("transformer.h.{l}.attn.attention.out_proj.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule("transformer.h.{l}.attn.attention.out_proj.bias", "D -> D", "blocks.attn.b_o"),
    *norm_rules("transformer.h.{l}.ln_2", "blocks.norm_mlp"),
    rule("transformer.h.{l}.mlp.c_fc.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule("transformer.h.{l}.mlp.c_fc.bias", "F -> F", "blocks.mlp.b_in"),
    rule("transformer.h.{l}.mlp.c_proj.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule("transformer.h.{l}.mlp.c_proj.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("transformer.ln_f", "norm_final"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
)

GPT_NEO = Family(
    name="gpt_neo",
    defaults=_DEFAULTS,
    types={"attention_types": list, "attention_layers": list, "intermediate_size": int},
    choices={"activation_function": HF_ACTIVATIONS},
    build=_arguments,
    rules=_RULES,
    prefix="transformer.",
    buffers=(r".*\.attn\.attention\.(bias|masked_bias)",),
    renamed={"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"},
    ignored={
        "training": ("attention_dropout", "embed_dropout", "resid_dropout"),
        "a head for classification": (
            "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
            "summary_proj_to_labels", "summary_first_dropout",
        ),
    },
)  # fmt: skip
