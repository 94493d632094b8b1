"""OLMo 2: Llama with norms of what attention and MLP write, and of all queries and keys at once."""

from typing import Any

from arrakis_jax.families import decoder
from arrakis_jax.families.base import rule


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    return decoder.llama_arguments(hf) | {"norm_placement": "post", "qk_norm": "all_heads"}


_RULES = (
    *decoder.END_RULES,
    *decoder.ATTENTION_RULES,
    # One norm over all heads at once, with a gain for each of their dimensions.
    rule(decoder.LAYER + "self_attn.q_norm.weight", "(H K) -> H K", "blocks.attn.norm_q.w"),
    rule(decoder.LAYER + "self_attn.k_norm.weight", "(G K) -> G K", "blocks.attn.norm_k.w"),
    rule(decoder.LAYER + "post_attention_layernorm.weight", "D -> D", "blocks.norm_attn_out.w"),
    *decoder.MLP_RULES,
    rule(decoder.LAYER + "post_feedforward_layernorm.weight", "D -> D", "blocks.norm_mlp_out.w"),
)

OLMO2 = decoder.Decoder(
    name="olmo2",
    defaults=decoder.DEFAULTS
    | {"vocab_size": 50304, "hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_bias": False},
    build=_arguments,
    rules=_RULES,
)
