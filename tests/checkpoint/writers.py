"""Small checkpoints of any family, written to disk."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from arrakis_jax.checkpoint.parameters import layers_of, parameters
from arrakis_jax.families import family_for

GPT2 = dict(model_type="gpt2", vocab_size=31, n_positions=13, n_embd=24, n_layer=3, n_head=4)
LLAMA = dict(
    model_type="llama", vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, head_dim=10,
)  # fmt: skip
MIXTRAL = LLAMA | dict(
    model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=12
)
# Experts in every other layer: a segment for each of them.
SEGMENTS = LLAMA | dict(
    model_type="qwen2_moe", num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[3],
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12,
    shared_expert_intermediate_size=20,
)  # fmt: skip
GPT_OSS = LLAMA | dict(
    model_type="gpt_oss", hidden_size=64, intermediate_size=32, num_local_experts=4,
    num_experts_per_tok=2,
)  # fmt: skip
TOKENS = np.arange(12).reshape(2, 6)
W_Q = "model.layers.0.self_attn.q_proj.weight"


def tensors_of(hf: dict, dtype=np.float32, spelling: int = 0) -> dict[str, np.ndarray]:
    """Random weights for a config, as they are on disk, in the first or another spelling."""
    rng = np.random.default_rng(0)
    family = family_for(hf["model_type"])
    config = family.config(hf)
    tensors = {}
    for param in parameters(config)[0]:
        name, layers = layers_of(param, config)
        rule = [rule for rule in family.rules if name in rule.params][spelling:][0]
        for layer in layers or (None,):
            for tensor in rule.names(config, layer):
                if tensor not in tensors:
                    tensors[tensor] = rng.normal(size=rule.shape(config)).astype(dtype)
    return tensors


def write(folder, hf=LLAMA, tensors=None, **changes):
    """A checkpoint folder; `changes` go to the config."""
    folder.mkdir(exist_ok=True)
    hf = hf | changes
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors_of(hf) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def shard(folder, **files):
    """Splits a folder's tensors over two files; `files` are changes of the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{i}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map | files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def logits(model):
    return np.asarray(model(jnp.asarray(TOKENS), capture=("logits",)).logits)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return a.config == b.config and all(np.array_equal(x, y) for x, y in leaves)
