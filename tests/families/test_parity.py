"""Logits and every stream point of Hugging Face's models, through a checkpoint on disk."""

import numpy as np
import pytest

from arrakis_jax.checkpoint import from_pretrained
from arrakis_jax.forward import run
from tests.families import reference

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
OLD_LLAMA3 = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}

CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-inverse-layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2-reordered": ("gpt2", {"reorder_and_upcast_attn": True}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False, "n_head": 24}),
    "gpt2-inner-relu": ("gpt2", {"n_inner": 70, "activation_function": "relu"}),
    "gpt2-gelu": ("gpt2", {"activation_function": "gelu", "layer_norm_epsilon": 0.1}),
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": None, "head_dim": None}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 0.1}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama3-old": ("llama", {"rope_scaling": OLD_LLAMA3, "rope_theta": 100.0}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}),
}


@pytest.mark.parametrize("case", CASES)
def test_parity(case, tmp_path):
    name, changes = CASES[case]
    torch_model = getattr(reference, name)(**changes)
    points = getattr(reference, f"{name.upper()}_POINTS")
    shards = {"max_shard_size": "40KB"} if case in ("gpt2-untied", "llama-tied") else {}
    torch_model.save_pretrained(tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)

    tokens, mask = reference.batch()
    want = reference.forward(torch_model, points, tokens, mask)
    out = run(from_pretrained(tmp_path), tokens, mask=mask)

    for point, theirs in want.items():
        ours = out.logits if point == "logits" else getattr(out.residuals, point)
        real = np.broadcast_to(mask, theirs.shape[:-1])
        error = np.abs(np.asarray(ours) - theirs)[real].max()
        assert error <= 2e-5 * np.abs(theirs[real]).max(), point
