"""Llama 1 to 3.3: RMSNorm, RoPE, grouped-query attention, SwiGLU."""

from arrakis_jax.families import decoder

LLAMA = decoder.Decoder(
    name="llama",
    defaults=decoder.DEFAULTS
    | {"hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False},
    ignored=decoder.IGNORED
    | {
        "training": ("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop"),
        "the name of a converter's format": ("is_llama_config",),
    },
    only=decoder.ONLY | {"rope_interleaved": (False,)},
)
