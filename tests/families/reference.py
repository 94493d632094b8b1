"""Tiny Hugging Face models of every family with all parameters random, and what they compute."""

import copy
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from tests.families.cases import CASES, LENGTHS, TINY

disable_progress_bar()
set_verbosity_error()  # of token ids outside of tiny vocabularies

SMALL = 7  # a token with a tiny embedding, so that the eps of the norms matters
# Modules whose only parameters are gains and biases of norms.
NORM = re.compile(r"norm|\bln_")


def torch_model(case: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The model of a case; for a real float64 one, build and run it inside `true_float64`."""
    family, changes = CASES[case]
    fields = copy.deepcopy({"model_type": family} | TINY[family] | changes)  # it changes dicts
    config = AutoConfig.for_model(**fields)
    # Falcon's eager attention adds ALiBi twice.
    attention = "sdpa" if getattr(config, "alibi", False) else "eager"
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention, experts_implementation="eager"
    )
    return randomised(model, seed)


def randomised(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Matrices of std 1.7 / sqrt(D), gains 1 +- 0.3, biases 0.3: no default hides a bug."""
    generator = torch.Generator().manual_seed(seed)
    centre = 0 if model.config.model_type.startswith("gemma") else 1  # Gemma adds 1 to its gains
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.double)
            if name.endswith(("bias", "sinks")):
                value = 0.3 * value
            elif NORM.search(name):
                value = centre + 0.3 * value
            else:
                value = 1.7 / model.config.hidden_size**0.5 * value
            parameter.copy_(value)
        model.get_input_embeddings().weight[SMALL] *= 1e-3
    return model.eval()


def batch(case: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of unequal length, padded on the left, with garbage at padding."""
    lengths = np.array(LENGTHS.get(case, LENGTHS["default"]))
    rng = np.random.default_rng(0)
    mask = np.arange(lengths.max())[None] >= lengths.max() - lengths[:, None]
    tokens = rng.integers(61, size=mask.shape)
    tokens[:, -2] = tokens[0, 3] = SMALL
    return tokens, mask


def forward(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """`logits [B,T,V]`, the input of block 0 `embed [B,T,D]` and every block's output
    `resid_post [L,B,T,D]`.

    These scalings of RoPE take the length of a batch's longest row for all rows, and the library
    each row's own. So they run a row at a time, and are zero at padding."""
    if not re.search("'(dynamic|longrope)'", str(model.config.to_dict())):
        return _forward(model, tokens, mask)
    rows = [
        _forward(model, tokens[b : b + 1, real], mask[b : b + 1, real])
        for b, real in enumerate(mask)
    ]
    empty = mask.shape[1] - mask.sum(-1)  # padding is on the left
    return {
        name: np.concatenate(
            [
                np.pad(row[name], [(0, 0)] * (row[name].ndim - 2) + [(n, 0), (0, 0)])
                for row, n in zip(rows, empty, strict=True)
            ],
            -3,
        )
        for name in rows[0]
    }


def _forward(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    seen = {}
    with torch.no_grad(), _watched(model, seen):
        logits = _run(model, tokens, mask)
    blocks = torch.stack([seen[layer] for layer in range(len(_layers(model)))])
    found = {"logits": logits, "embed": seen["embed"], "resid_post": blocks}
    narrow = model.dtype == torch.bfloat16  # which numpy does not have
    return {name: (x.float() if narrow else x).numpy() for name, x in found.items()}


def gradient(
    model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray, a: np.ndarray, b: np.ndarray
) -> np.ndarray:
    """`[B,T,D]`, the gradient of `logit[a] - logit[b]` at the last token of each row with respect
    to the input of block 0.
    """
    seen, rows = {}, torch.arange(len(tokens))
    with torch.enable_grad(), _watched(model, seen, leaf=True):
        last = _run(model, tokens, mask)[:, -1]
        difference = last[rows, torch.tensor(a)] - last[rows, torch.tensor(b)]
        (found,) = torch.autograd.grad(difference.sum(), seen["embed"])
    return found.numpy()


def _run(model: PreTrainedModel, tokens: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    given = {"attention_mask": torch.tensor(mask.astype(int)), "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.tensor(np.maximum(mask.cumsum(-1) - 1, 0))
    return model(torch.tensor(tokens), **given).logits


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    decoder = getattr(model, model.base_model_prefix)
    decoder = getattr(decoder, "decoder", decoder)
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@contextmanager
def _watched(model: PreTrainedModel, seen: dict[Any, torch.Tensor], *, leaf: bool = False):
    """Notes the input of block 0, of which it can make a leaf, and the outputs of all blocks."""

    def enter(module, args):
        seen["embed"] = args[0].detach().requires_grad_() if leaf else args[0]
        return (seen["embed"], *args[1:])

    def leave(layer, module, args, out):
        seen[layer] = out[0] if isinstance(out, tuple) else out

    layers = _layers(model)
    hooks = [m.register_forward_hook(partial(leave, i)) for i, m in enumerate(layers)]
    hooks.append(layers[0].register_forward_pre_hook(enter))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Without(TorchDispatchMode):
    """Raises where an operation's result has this dtype."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.dtype == self.dtype:
                raise TypeError(f"{func} gives {self.dtype}")
        return out


@contextmanager
def true_float64() -> Iterator[None]:
    """Under this, models built with dtype float64 compute in nothing narrower.

    Their code asks for float32 in norms, softmax and rotary tables: by constants of torch, which
    are replaced, and by `Tensor.float` and `Tensor.to`, which are too. Raises where it still
    gets a float32 tensor.
    """
    single, double, to = torch.float32, torch.float64, torch.Tensor.to

    def widened(self, *args, **kwargs):
        args = [double if arg is single else arg for arg in args]
        kwargs = {name: double if arg is single else arg for name, arg in kwargs.items()}
        return to(self, *args, **kwargs)

    patches = (
        (torch, "float32", double),
        (torch, "float", double),
        (torch.Tensor, "float", torch.Tensor.double),
        (torch.Tensor, "to", widened),
    )
    originals = [getattr(place, name) for place, name, _ in patches]
    torch.set_default_dtype(double)
    try:
        for place, name, value in patches:
            setattr(place, name, value)
        with _Without(single):
            yield
    finally:
        for (place, name, _), value in zip(patches, originals, strict=True):
            setattr(place, name, value)
        torch.set_default_dtype(single)


def save(
    model: PreTrainedModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shards: bool = False,
    old_json: bool = False,
) -> None:
    """Writes a checkpoint: in a dtype, in at least two files, with a config.json as of old."""
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, **({"max_shard_size": size // 2 + 1} if shards else {}))
    if old_json:
        file = folder / "config.json"
        file.write_text(json.dumps(older(json.loads(file.read_text())), indent=2))


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights rounded to a dtype, in its own dtype."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model


def older(config: dict[str, Any]) -> dict[str, Any]:
    """The same config in the words of the versions of transformers that most checkpoints are of."""
    old = dict(config, torch_dtype=config["dtype"])
    for name in ("dtype", "layer_types", "attention_layers", "no_rope_layers"):
        old.pop(name, None)
    if "head_dim" in old and old["head_dim"] * old["num_attention_heads"] == old["hidden_size"]:
        old.pop("head_dim")
    rope = old.pop("rope_parameters", None) or {}
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    scaling = {"type" if name == "rope_type" else name: value for name, value in rope.items()}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            old[name] = scaling.pop(name)
    if rope:
        old["rope_scaling"] = None if scaling["type"] == "default" else scaling
    if old["model_type"] == "falcon":
        new = old.pop("new_decoder_architecture")
        n_kv_heads = old.pop("num_kv_heads")
        old |= {"n_head_kv": n_kv_heads} if new else {}
        old["model_type"] = "RefinedWeb" if new else "RefinedWebModel"
        for name in ("ffn_hidden_size", "activation", "num_ln_in_parallel_attn"):
            old.pop(name)
        old.pop("multi_query" if new else "rope_scaling")
    for name, other in OLDER.get(config["model_type"], {}).items():
        old[other] = old.pop(name)
    return old


OLDER = {
    "bloom": {"hidden_size": "n_embed", "n_head": "num_attention_heads"},
    "falcon": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
}
