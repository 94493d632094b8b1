"""Tiny Hugging Face models with every parameter random, and what flows through them."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

GPT2 = dict(vocab_size=61, n_positions=40, n_embd=48, n_layer=3, n_head=6)
LLAMA = dict(
    vocab_size=61, hidden_size=48, intermediate_size=56, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=3, head_dim=10, max_position_embeddings=64,
)  # fmt: skip

# Where each stream point is seen: (module, "in" or "out"); `{l}` is the layer.
GPT2_POINTS = {
    "resid_pre": ("transformer.h.{l}.ln_1", "in"),
    "attn_out": ("transformer.h.{l}.attn", "out"),
    "resid_mid": ("transformer.h.{l}.ln_2", "in"),
    "mlp_out": ("transformer.h.{l}.mlp", "out"),
    "final": ("transformer.ln_f", "in"),
}
LLAMA_POINTS = {
    "resid_pre": ("model.layers.{l}.input_layernorm", "in"),
    "attn_out": ("model.layers.{l}.self_attn", "out"),
    "resid_mid": ("model.layers.{l}.post_attention_layernorm", "in"),
    "mlp_out": ("model.layers.{l}.mlp", "out"),
    "final": ("model.norm", "in"),
}


def gpt2(**changes) -> torch.nn.Module:
    config = GPT2Config(**GPT2 | changes, attn_implementation="eager")
    return randomised(GPT2LMHeadModel(config))


def llama(**changes) -> torch.nn.Module:
    config = LlamaConfig(**LLAMA | changes, attn_implementation="eager")
    return randomised(LlamaForCausalLM(config))


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Matrices of std 1.7 / sqrt(D), gains 1 +- 0.3, biases 0.3: no default hides a bug."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                value = 0.3 * value
            elif value.ndim == 1:
                value = 1 + 0.3 * value
            else:
                value = 1.7 / model.config.hidden_size**0.5 * value
            parameter.copy_(value)
    return model.eval()


def batch(vocab: int = 61, lengths=(37, 5, 22)) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length, padded on the left, with garbage at padding."""
    rng = np.random.default_rng(0)
    width = max(lengths)
    mask = np.arange(width)[None] >= width - np.array(lengths)[:, None]
    return rng.integers(vocab, size=mask.shape), mask


def forward(
    model: torch.nn.Module, points: dict, tokens: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """The logits and every stream point, stacked over layers where there are several."""
    seen = {}
    hooks = list(_hooks(model, points, seen))
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.no_grad():
        logits = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(int)),
            position_ids=torch.tensor(positions),
        ).logits
    for hook in hooks:
        hook.remove()
    result = {name: np.stack([v.numpy() for v in values]) for name, values in seen.items()}
    return result | {"logits": logits.numpy(), "final": result["final"][0]}


def _hooks(model, points, seen) -> Iterator:
    for point, (path, side) in points.items():
        seen[point] = []
        for layer in range(model.config.num_hidden_layers if "{l}" in path else 1):
            module = model.get_submodule(path.format(l=layer))
            yield module.register_forward_hook(partial(_record, seen[point], side))


def _record(values, side, module, given, out):
    value = given if side == "in" else out
    values.append(value[0] if isinstance(value, tuple) else value)
