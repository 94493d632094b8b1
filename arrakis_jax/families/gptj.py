"""GPT-J: LayerNorm, interleaved RoPE, attention and MLP in parallel on one norm."""

from typing import Any

from arrakis_jax.families.base import HF_ACTIVATIONS, Family, norm_rules, per_head, rule

_DEFAULTS = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "rotary_dim": 64,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    width = hf["n_embd"]
    return {
        "n_layers": hf["n_layer"],
        "d_model": width,
        "n_heads": hf["n_head"],
        "n_kv_heads": hf["n_head"],
        "d_head": per_head(width, hf["n_head"], "n_embd"),
        "d_mlp": 4 * width if hf["n_inner"] is None else hf["n_inner"],
        "vocab_size": hf["vocab_size"],
        "norm": "layernorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "positions": "rope",
        "max_positions": hf["n_positions"],
        # The class has no field for it.
        "rope_theta": 10000.0,
        "rotary_dim": hf["rotary_dim"],
        "rope_interleaved": True,
        "parallel": True,
        "shared_norm": True,
        "activation": hf["activation_function"],
        "mlp_bias": True,
        "tied": hf["tie_word_embeddings"],
        "unembed_bias": True,
    }


_RULES = (
    rule("transformer.wte.weight", "V D -> V D", "w_e"),
    *norm_rules("transformer.h.{l}.ln_1", "blocks.norm_attn"),
    rule("transformer.h.{l}.attn.q_proj.weight", "(H K) D -> D H K", "blocks.attn.w_q"),
    rule("transformer.h.{l}.attn.k_proj.weight", "(G K) D -> D G K", "blocks.attn.w_k"),
    rule("transformer.h.{l}.attn.v_proj.weight", "(G K) D -> D G K", "blocks.attn.w_v"),
    rule("transformer.h.{l}.attn.out_proj.weight", "D (H K) -> H K D", "blocks.attn.w_o"),
    rule("transformer.h.{l}.mlp.fc_in.weight", "F D -> D F", "blocks.mlp.w_in"),
    rule("transformer.h.{l}.mlp.fc_in.bias", "F -> F", "blocks.mlp.b_in"),
    rule("transformer.h.{l}.mlp.fc_out.weight", "D F -> F D", "blocks.mlp.w_out"),
    rule("transformer.h.{l}.mlp.fc_out.bias", "D -> D", "blocks.mlp.b_out"),
    *norm_rules("transformer.ln_f", "norm_final"),
    rule("lm_head.weight", "V D -> D V", "w_u"),
    rule("lm_head.bias", "V -> V", "b_u"),
)

GPTJ = Family(
    name="gptj",
    defaults=_DEFAULTS,
    types={"n_inner": int},
    choices={"activation_function": HF_ACTIVATIONS},
    build=_arguments,
    rules=_RULES,
    prefix="transformer.",
    buffers=(r".*\.attn\.(bias|masked_bias)",),
    renamed={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    ignored={
        "training": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "a head for classification": (
            "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
            "summary_first_dropout",
        ),
        "n_positions under an older name": ("n_ctx",),
    },
    only={"rotary": (True,), "scale_attn_weights": (True,)},
)  # fmt: skip
