"""SmolLM3: Llama without RoPE in every fourth layer, and perhaps with a window there."""

from typing import Any

from arrakis_jax.core.errors import expected
from arrakis_jax.families import decoder


def _arguments(hf: dict[str, Any]) -> dict[str, Any]:
    n_layers, rotates = hf["num_hidden_layers"], hf["no_rope_layers"]
    interval = decoder.positive(hf, "no_rope_layer_interval")
    # Despite its name, `no_rope_layers` is 1 where a layer has RoPE.
    if rotates is None:
        rotates = [(layer + 1) % interval != 0 for layer in range(n_layers)]
    if len(rotates) < n_layers or not all(use in (0, 1) for use in rotates):
        must = f"0 or 1 for each of {n_layers} layers"
        raise ValueError(expected("no_rope_layers", must, rotates, "check both"))
    # A list may be longer than the model; what is left over is not read.
    turned = tuple(map(bool, rotates[:n_layers]))
    slides = hf["use_sliding_window"] and hf["sliding_window"] is not None
    windows = decoder.windows(hf, lambda layer: slides and not turned[layer])
    return decoder.llama_arguments(hf) | windows | {"rope_layers": None if all(turned) else turned}


SMOLLM3 = decoder.Decoder(
    name="smollm3",
    defaults=decoder.DEFAULTS
    | {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
    build=_arguments,
    types=decoder.TYPES | {"no_rope_layers": list},
    ignored=decoder.IGNORED | {"not read by the model": ("max_window_layers",)},
)
