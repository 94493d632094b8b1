"""Gemma 3: Gemma 2 with normed queries and keys, and another RoPE in layers with a window.

A text model has this config as it is. In the other models the config is nested, and the checkpoint
has the weights of a vision tower too, which are left out.
"""

from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.families import decoder, gemma2, rope
from arrakis_jax.families.base import HF_ACTIVATIONS

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    full, local = _ropes(hf)
    pattern = decoder.positive(hf, "sliding_window_pattern")
    windows = decoder.windows(hf, lambda layer: (layer + 1) % pattern != 0)
    # Layers with a window rotate with a base and a scaling of their own.
    if windows:
        turned = rope.rope_arguments(local)
        windows["window_rope_theta"] = turned["rope_theta"]
        windows["window_rope_scaling"] = turned["rope_scaling"]
    return gemma2.shared_arguments(full) | windows | {"qk_norm": "head"}


def _ropes(hf: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields with RoPE of the layers without a window, and of those with one.

    Transformers 5 writes a rotary dict for each type of layers; earlier versions `rope_scaling` for
    those without a window, and `rope_local_base_freq` for those with one.
    """
    by_kind = hf["rope_parameters"] or {}
    right = all(isinstance(kind, dict | None) for kind in by_kind.values())
    if not right or by_kind.keys() - {_FULL, _SLIDING}:
        must = f"dicts under {_FULL!r} and {_SLIDING!r}"
        raise ValueError(expected("rope_parameters", must, by_kind, "give one to each"))
    # `rope_scaling` is the older spelling, and applies to layers without a window only.
    full = (by_kind.get(_FULL) or {"rope_type": "default"}) | (hf["rope_scaling"] or {})
    local = {"rope_parameters": by_kind.get(_SLIDING), "rope_theta": hf["rope_local_base_freq"]}
    return (
        hf | {"rope_scaling": None, "rope_parameters": full},
        hf | {"rope_scaling": None} | local,
    )


GEMMA3 = decoder.Decoder(
    name="gemma3",
    aliases=("gemma3_text",),
    nested="text_config",
    defaults=gemma2.SHARED_DEFAULTS
    | {
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    },
    build=_arguments,
    rules=(*gemma2.GEMMA2.rules, *decoder.QK_NORM_RULES),
    types=decoder.TYPES | {"final_logit_softcapping": float},
    choices={"hidden_activation": HF_ACTIVATIONS},
    spelled={
        r"^language_model\.lm_head\.": "lm_head.",
        r"^(model\.)?language_model\.(model\.)?": "model.",
    },
    buffers=(r".*rotary_emb.*inv_freq", r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    ignored=decoder.IGNORED
    | {
        "hidden_activation, as Gemma names it": ("hidden_act",),
        "sliding_window_pattern, as transformers 5 writes it": ("_sliding_window_pattern",),
    },
    only=decoder.ONLY
    | {
        "use_bidirectional_attention": (False,),
        "attn_logit_softcapping": (),
    },
)
