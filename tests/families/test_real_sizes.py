"""The parameter count of well-known checkpoints, from their configs, equals Hugging Face's."""

from math import prod

import jax
import pytest
import torch
from flax import nnx
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from arrakis_jax import Transformer
from arrakis_jax.families import families, family_for

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}


def sizes(layers, width, inner, heads, kv_heads, vocab, **others):
    return dict(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=inner,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab, **others,
    )  # fmt: skip


# Name of the checkpoint: its model_type and the fields that decide the number of parameters.
CHECKPOINTS = {
    "gpt2-xl": ("gpt2", dict(n_layer=48, n_embd=1600, n_head=25)),
    "gpt-neo-2.7B": ("gpt_neo", dict(
        num_layers=32, hidden_size=2560, num_heads=20, max_position_embeddings=2048,
        attention_types=[[["global", "local"], 16]])),
    "pythia-12b": ("gpt_neox", dict(
        num_hidden_layers=36, hidden_size=5120, intermediate_size=20480, num_attention_heads=40,
        vocab_size=50688)),
    "gpt-j-6b": ("gptj", dict()),
    "opt-66b": ("opt", dict(
        num_hidden_layers=64, hidden_size=9216, ffn_dim=36864, num_attention_heads=72,
        word_embed_proj_dim=9216)),
    "opt-350m": ("opt", dict(
        num_hidden_layers=24, hidden_size=1024, ffn_dim=4096, num_attention_heads=16,
        word_embed_proj_dim=512, do_layer_norm_before=False)),
    "bloom": ("bloom", dict(n_layer=70, hidden_size=14336, n_head=112, vocab_size=250880)),
    "falcon-7b": ("falcon", dict(
        num_hidden_layers=32, hidden_size=4544, num_attention_heads=71, multi_query=True,
        parallel_attn=True, bias=False, alibi=False, vocab_size=65024)),
    "falcon-40b": ("falcon", dict(
        num_hidden_layers=60, hidden_size=8192, num_attention_heads=128, num_kv_heads=8,
        new_decoder_architecture=True, bias=False, alibi=False, vocab_size=65024)),
    "falcon-rw-1b": ("falcon", dict(
        num_hidden_layers=24, hidden_size=2048, num_attention_heads=32, multi_query=False,
        parallel_attn=False, bias=True, alibi=True, vocab_size=50304)),
    "Llama-3.1-70B": ("llama", sizes(80, 8192, 28672, 64, 8, 128256, rope_parameters=LLAMA3)),
    "Mistral-7B-v0.1": ("mistral", sizes(32, 4096, 14336, 32, 8, 32000)),
    "Mixtral-8x7B": ("mixtral", sizes(32, 4096, 14336, 32, 8, 32000, num_local_experts=8)),
    "gemma-7b": ("gemma", sizes(28, 3072, 24576, 16, 16, 256000, head_dim=256)),
    "gemma-2-27b": ("gemma2", sizes(
        46, 4608, 36864, 32, 16, 256000, head_dim=128, query_pre_attn_scalar=144)),
    "gemma-3-27b": ("gemma3_text", sizes(62, 5376, 21504, 32, 16, 262208, head_dim=128)),
    "phi-2": ("phi", sizes(32, 2560, 10240, 32, 32, 51200, partial_rotary_factor=0.4)),
    "Phi-3-mini-128k": ("phi3", sizes(
        32, 3072, 8192, 32, 32, 32064, rope_parameters=LONG, pad_token_id=0,
        max_position_embeddings=131072, original_max_position_embeddings=4096)),
    "Qwen2-72B": ("qwen2", sizes(80, 8192, 29568, 64, 8, 152064)),
    "Qwen3-32B": ("qwen3", sizes(64, 5120, 25600, 64, 8, 151936, head_dim=128)),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", sizes(
        24, 2048, 5632, 16, 16, 151936, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632)),
    "Qwen3-30B-A3B": ("qwen3_moe", sizes(
        48, 2048, 6144, 32, 4, 151936, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768)),
    "stablelm-2-12b": ("stablelm", sizes(
        40, 5120, 13824, 32, 8, 100352, qk_layernorm=True, use_parallel_residual=True)),
    "OLMo-7B": ("olmo", sizes(32, 4096, 11008, 32, 32, 50304)),
    "OLMo-2-13B": ("olmo2", sizes(40, 5120, 13824, 40, 40, 100352)),
    "starcoder2-15b": ("starcoder2", sizes(40, 6144, 24576, 48, 4, 49152)),
    "c4ai-command-r-v01": ("cohere", sizes(40, 8192, 22528, 64, 64, 256000)),
    "gpt-oss-120b": ("gpt_oss", sizes(
        36, 2880, 2880, 64, 8, 201088, head_dim=64, num_local_experts=128)),
    "SmolLM3-3B": ("smollm3", sizes(36, 2048, 11008, 16, 4, 128256)),
    "granite-3.1-8b": ("granite", sizes(40, 4096, 12800, 32, 8, 49155, tie_word_embeddings=True)),
}  # fmt: skip


def test_every_family_is_here():
    assert {family_for(model_type).name for model_type, _ in CHECKPOINTS.values()} == {
        family.name for family in families().values()
    }


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_as_many_parameters_as_hugging_face(name):
    model_type, values = CHECKPOINTS[name]
    theirs = CONFIG_MAPPING[model_type](**values)
    with torch.device("meta"):
        want = sum(p.numel() for p in AutoModelForCausalLM.from_config(theirs).parameters())
    config = family_for(model_type).config(theirs.to_dict())
    ours = jax.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert sum(prod(leaf.shape) for leaf in jax.tree.leaves(ours)) == want
