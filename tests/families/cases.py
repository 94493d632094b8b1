"""A tiny config of every family, and the changes to it that cover what the family may do."""

from typing import Any

LLAMA: dict[str, Any] = dict(
    vocab_size=61, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=64,
)  # fmt: skip
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)


def rope(kind: str = "default", theta: float = 100.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **fields}}


TINY: dict[str, dict[str, Any]] = {
    "gpt2": dict(vocab_size=61, n_positions=40, n_embd=48, n_layer=3, n_head=6),
    "gpt_neo": dict(
        vocab_size=61, max_position_embeddings=40, hidden_size=48, num_layers=3, num_heads=6,
        attention_types=[[["global", "local"], 1], [["local"], 1]], window_size=5,
    ),
    "gpt_neox": dict(
        vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        intermediate_size=56, max_position_embeddings=64,
    ) | rope(partial_rotary_factor=0.5),
    "gptj": dict(vocab_size=61, n_positions=40, n_embd=48, n_layer=3, n_head=6, rotary_dim=4),
    "opt": dict(
        vocab_size=61, hidden_size=48, num_hidden_layers=3, ffn_dim=56, num_attention_heads=6,
        max_position_embeddings=40,
    ),
    "bloom": dict(vocab_size=61, hidden_size=48, n_layer=3, n_head=6),
    "falcon": dict(
        vocab_size=61, hidden_size=48, num_hidden_layers=3, num_attention_heads=6,
        max_position_embeddings=64,
    ) | rope(),
    "llama": LLAMA | dict(head_dim=10) | rope(),
    "mistral": LLAMA | dict(head_dim=10, sliding_window=5) | rope(),
    "mixtral": LLAMA
    | dict(head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=None)
    | rope(),
    "gemma": LLAMA | dict(head_dim=10) | rope(),
    "gemma2": LLAMA
    | dict(
        head_dim=10, sliding_window=5, query_pre_attn_scalar=7, attn_logit_softcapping=4.0,
        final_logit_softcapping=6.0,
    )
    | rope(),
    "gemma3": LLAMA
    | dict(
        model_type="gemma3_text", head_dim=10, sliding_window=5, query_pre_attn_scalar=7,
        num_hidden_layers=4,
        layer_types=[f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding")],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 8.0},
        },
    ),
    "phi": LLAMA | rope(partial_rotary_factor=0.5),
    "phi3": LLAMA | rope() | dict(original_max_position_embeddings=64, pad_token_id=None),
    "qwen2": LLAMA | rope(),
    "qwen3": LLAMA | dict(head_dim=10) | rope(),
    "qwen2_moe": LLAMA | MOE | dict(shared_expert_intermediate_size=36) | rope(),
    "qwen3_moe": LLAMA | MOE | dict(head_dim=10) | rope(),
    "stablelm": LLAMA | rope(partial_rotary_factor=0.5),
    "olmo": LLAMA | rope() | dict(pad_token_id=None, eos_token_id=None),
    "olmo2": LLAMA | rope() | dict(pad_token_id=None, eos_token_id=None),
    "starcoder2": LLAMA | rope(),
    "cohere": LLAMA | rope() | dict(logit_scale=0.3),
    "gpt_oss": LLAMA
    | dict(head_dim=10, num_local_experts=5, num_experts_per_tok=2, sliding_window=5)
    | rope(
        "yarn", factor=8.0, beta_fast=4.0, beta_slow=1.0, truncate=False,
        original_max_position_embeddings=16,
    ),
    "smollm3": LLAMA | dict(num_hidden_layers=4, pad_token_id=None) | rope(),
    "granite": LLAMA
    | dict(
        embedding_multiplier=3.0, logits_scaling=0.7, residual_multiplier=0.6,
        attention_multiplier=0.2,
    )
    | rope(),
}  # fmt: skip

LLAMA3 = dict(
    factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
YARN = dict(factor=4.0, beta_fast=4.0, beta_slow=0.5, original_max_position_embeddings=16)
FACTORS = dict(short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[1.0, 2.5, 4.0, 7.0])
FIVE = dict(short_factor=[1.0, 1.5, 2.0, 3.0, 3.5], long_factor=[1.0, 2.5, 4.0, 7.0, 9.0])
RW = dict(alibi=True, parallel_attn=False, multi_query=False, bias=True)
NEW = dict(new_decoder_architecture=True, num_kv_heads=3)
SLIDING = dict(use_sliding_window=True, sliding_window=5)

# Name: the family, and the changes to its tiny config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-reordered": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False, "n_head": 24}),
    "gpt2-inner-relu": ("gpt2", {"n_inner": 70, "activation_function": "relu"}),
    "gpt2-gelu": ("gpt2", {"activation_function": "gelu", "layer_norm_epsilon": 0.1}),
    "gpt_neo": ("gpt_neo", {}),
    "gpt_neo-global": ("gpt_neo", {
        "attention_types": [[["global"], 3]], "intermediate_size": 70,
        "activation_function": "relu", "tie_word_embeddings": False,
    }),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {
        "use_parallel_residual": False, "hidden_act": "gelu_fast",
    }),
    "gpt_neox-no-bias": ("gpt_neox", {
        "attention_bias": False, "tie_word_embeddings": True, "layer_norm_eps": 0.01,
        **rope("linear", factor=3.0, partial_rotary_factor=1.0),
    }),
    "gptj": ("gptj", {}),
    "gptj-tied": ("gptj", {"tie_word_embeddings": True, "n_inner": 70, "rotary_dim": 8}),
    "opt": ("opt", {}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "opt-after": ("opt", {"do_layer_norm_before": False, "tie_word_embeddings": False}),
    "opt-projected": ("opt", {
        "word_embed_proj_dim": 20, "tie_word_embeddings": False, "activation_function": "gelu",
    }),
    "opt-no-final-norm": ("opt", {"_remove_final_layer_norm": True}),
    "opt-plain": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "bloom": ("bloom", {}),
    "bloom-normed-residual": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "bloom-untied": ("bloom", {"tie_word_embeddings": False, "n_head": 3}),
    "bloom-4-heads": ("bloom", {"n_head": 4, "layer_norm_epsilon": 0.01}),
    "falcon-7b": ("falcon", {}),
    "falcon-7b-bias": ("falcon", {"bias": True, "tie_word_embeddings": False}),
    "falcon-40b": ("falcon", NEW),
    "falcon-11b": ("falcon", NEW | {
        "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 56, "activation": "gelu_pytorch_tanh",
    }),
    "falcon-40b-dynamic": ("falcon", NEW | {
        "max_position_embeddings": 12, "num_kv_heads": 2, "bias": True,
        **rope("dynamic", factor=2.0),
    }),
    "falcon-rw": ("falcon", RW),
    "falcon-rw-long": ("falcon", RW | {"num_attention_heads": 12}),
    "falcon-alibi-7b": ("falcon", {"alibi": True, "num_attention_heads": 12}),
    "falcon-alibi-40b": ("falcon", NEW | {"alibi": True}),
    "falcon-sequential": ("falcon", {"parallel_attn": False}),
    "falcon-mha": ("falcon", {"multi_query": False, "layer_norm_epsilon": 0.01}),
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": None, "head_dim": None}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 0.1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear": ("llama", rope("linear", factor=3.0)),
    "llama-dynamic": ("llama", {"max_position_embeddings": 12, **rope("dynamic", factor=2.0)}),
    "llama-dynamic-short": ("llama", rope("dynamic", factor=2.0)),
    "llama-llama3": ("llama", rope("llama3", **LLAMA3)),
    "llama-yarn": ("llama", rope("yarn", **YARN)),
    "llama-yarn-exact": ("llama", rope("yarn", truncate=False, **YARN)),
    "llama-yarn-mscale": ("llama", rope("yarn", mscale=0.7, mscale_all_dim=1.2, **YARN)),
    "llama-yarn-attention": ("llama", rope("yarn", attention_factor=1.3, **YARN)),
    "llama-longrope": ("llama", rope("longrope", original_max_position_embeddings=16, **FIVE)),
    "llama-longrope-short": ("llama", rope(
        "longrope", factor=4.0, original_max_position_embeddings=17, **FIVE,
    )),
    "mistral": ("mistral", {}),
    "mistral-global": ("mistral", {
        "sliding_window": None, "head_dim": None, **rope("yarn", **YARN),
    }),
    "mistral-tied": ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mixtral": ("mixtral", {}),
    "mixtral-window": ("mixtral", {
        "sliding_window": 5, "head_dim": None, "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    }),
    "gemma": ("gemma", {}),
    "gemma-mqa": ("gemma", {
        "num_key_value_heads": 1, "hidden_act": "gelu", "attention_bias": True,
        "tie_word_embeddings": False,
    }),
    "gemma2": ("gemma2", {}),
    "gemma2-uncapped": ("gemma2", {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
        "tie_word_embeddings": False,
    }),
    "gemma2-layers": ("gemma2", {
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
    }),
    "gemma3": ("gemma3", {}),
    "gemma3-pattern": ("gemma3", {
        "num_hidden_layers": 7, "layer_types": None, "rope_parameters": None, "sliding_window": 4,
        "final_logit_softcapping": 6.0, "attention_bias": True, "num_key_value_heads": 1,
    }),
    "phi": ("phi", {}),
    "phi-mha": ("phi", {
        "num_key_value_heads": None, "hidden_size": 60, **rope(partial_rotary_factor=0.4),
    }),
    "phi-qk-norm": ("phi", {"qk_layernorm": True, "layer_norm_eps": 0.01}),
    "phi-tied": ("phi", {
        "tie_word_embeddings": True, "num_key_value_heads": 1, "hidden_act": "relu",
        **rope("llama3", partial_rotary_factor=1.0, **LLAMA3),
    }),
    "phi3": ("phi3", {}),
    "phi3-long": ("phi3", {
        "original_max_position_embeddings": 16, **rope("longrope", **FACTORS),
    }),
    "phi3-short": ("phi3", {
        "original_max_position_embeddings": 17, "sliding_window": 5, **rope("longrope", **FACTORS),
    }),
    "phi3-partial": ("phi3", {"tie_word_embeddings": True, **rope(partial_rotary_factor=0.75)}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {**SLIDING, "max_window_layers": 1, "tie_word_embeddings": True}),
    "qwen2-layers": ("qwen2", {
        **SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **rope("yarn", **YARN),
    }),
    "qwen3": ("qwen3", {}),
    "qwen3-window": ("qwen3", {
        **SLIDING, "max_window_layers": 2, "attention_bias": True, "tie_word_embeddings": True,
        "rms_norm_eps": 0.1,
    }),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe-window": ("qwen2_moe", {
        **SLIDING, "max_window_layers": 1, "norm_topk_prob": True, "qkv_bias": False,
        "num_experts_per_tok": 3,
    }),
    "qwen2_moe-sparse": ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
    "qwen2_moe-dense-last": ("qwen2_moe", {"mlp_only_layers": [2], "tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe-dense-first": ("qwen3_moe", {"mlp_only_layers": [0], "attention_bias": True}),
    "qwen3_moe-window": ("qwen3_moe", {
        **SLIDING, "decoder_sparse_step": 2, "tie_word_embeddings": True,
    }),
    "stablelm": ("stablelm", {}),
    "stablelm-12b": ("stablelm", {
        "use_parallel_residual": True, "qk_layernorm": True, "layer_norm_eps": 0.01,
    }),
    "stablelm-qk-norm": ("stablelm", {
        "qk_layernorm": True, "use_qkv_bias": True, "tie_word_embeddings": True,
        **rope("dynamic", factor=2.0, partial_rotary_factor=0.5), "max_position_embeddings": 12,
    }),
    "olmo": ("olmo", {}),
    "olmo-clipped": ("olmo", {
        "clip_qkv": 0.7, "tie_word_embeddings": True, "num_key_value_heads": None,
        "attention_bias": True,
    }),
    "olmo2": ("olmo2", {}),
    "olmo2-mqa": ("olmo2", {
        "num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True,
        "rms_norm_eps": 0.01,
    }),
    "starcoder2": ("starcoder2", {}),
    "starcoder2-window": ("starcoder2", {
        "sliding_window": 5, "use_bias": False, "tie_word_embeddings": False, "norm_epsilon": 0.01,
    }),
    "cohere": ("cohere", {}),
    "cohere-qk-norm": ("cohere", {
        "use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False,
        "layer_norm_eps": 0.01,
    }),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss-limit": ("gpt_oss", {
        "swiglu_limit": 0.5, "attention_bias": False, "rms_norm_eps": 0.01,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"], **rope(),
    }),
    "smollm3": ("smollm3", {}),
    "smollm3-window": ("smollm3", {
        **SLIDING, "no_rope_layers": [1, 0, 1, 0], "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": False,
    }),
    "granite": ("granite", {}),
    "granite-biases": ("granite", {
        "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "num_key_value_heads": 1, **rope("linear", factor=2.0),
    }),
}  # fmt: skip

# How many tokens the rows of a case's batch have; longest first, so that padding is on the left.
LENGTHS = {
    "default": (17, 4, 11),
    "falcon-rw-long": (290, 5),  # beyond 256, bfloat16 holds no odd position
}

# The cases that are also read from a config.json as old versions of transformers wrote it.
OLD = (
    "gpt2-untied", "gpt_neo", "gpt_neox-sequential", "gptj", "opt-350m", "bloom", "falcon-7b",
    "falcon-40b", "falcon-rw", "llama-llama3", "llama-yarn", "mistral", "mixtral", "gemma",
    "gemma2", "gemma3-pattern", "phi", "phi3-long", "qwen2-window", "qwen3", "qwen2_moe-sparse",
    "qwen3_moe-dense-first", "stablelm-12b", "olmo-clipped", "olmo2", "starcoder2",
    "cohere-qk-norm", "gpt_oss", "smollm3", "granite",
)  # fmt: skip

# The first case of each family.
FIRST = {family: case for case, (family, _) in reversed(CASES.items())}

# The first case of each family, and those that show a feature which it does not.
FEATURES = (
    "gpt2", "gpt_neo", "gpt_neox", "gpt_neox-sequential", "gptj", "opt", "opt-350m", "bloom",
    "bloom-normed-residual", "falcon-7b", "falcon-40b", "falcon-rw-long", "llama", "llama-linear",
    "llama-dynamic", "llama-llama3", "llama-yarn-exact", "llama-longrope", "mistral", "mixtral",
    "gemma", "gemma2", "gemma3", "phi", "phi-qk-norm", "phi3-long", "qwen2-window", "qwen3",
    "qwen2_moe", "qwen2_moe-dense-last", "qwen3_moe", "stablelm-12b", "olmo-clipped", "olmo2",
    "starcoder2", "cohere-qk-norm", "gpt_oss-limit", "smollm3", "granite",
)  # fmt: skip

CHOSEN = tuple(case for case in CASES if case in FEATURES or case in FIRST.values())
