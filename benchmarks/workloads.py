"""The models and inputs that both sides of a comparison are given (needs numpy alone)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

# The logit difference that every job explains, at the last position unless it says otherwise.
TARGET, AGAINST = 3, 4


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, and the shapes `(batch, tokens)` of what it is run on.

    Attributes:
        family: the `model_type` of Hugging Face.
        shape: the fields of its config that are not the defaults; None for the shipped model.
        dtype: of the weights.
        batch: of a plain forward, an attribution, and of pairs.
        integral: of integrated gradients.
        sweep: of exact patching, layers x positions.
        edges: of edge attribution patching, of which a peer makes a Python object for each edge
            and position.
    """

    family: str
    shape: dict[str, Any] | None
    dtype: str = "float32"
    batch: tuple[int, int] = (8, 128)
    integral: tuple[int, int] = (2, 32)
    sweep: tuple[int, int] = (1, 32)
    edges: tuple[int, int] = (1, 8)


SMALL = dict(batch=(2, 8), integral=(1, 4), sweep=(1, 4))
WORKLOADS = {
    "gpt2": Workload(family="gpt2", shape={}),
    "llama-1b": Workload(
        family="llama",
        shape=dict(
            vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
            num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            max_position_embeddings=2048,
        ),
        dtype="bfloat16", batch=(1, 128), integral=(1, 16), sweep=(1, 4),
    ),
    "shipped": Workload(
        family="llama", shape=None, batch=(1, 16), integral=(1, 16), sweep=(1, 16)
    ),
    "tiny": Workload(
        family="gpt2", shape=dict(n_embd=32, n_layer=2, n_head=4, vocab_size=97), **SMALL
    ),
}  # fmt: skip


def tokens(shape: tuple[int, int], vocab_size: int, seed: int) -> np.ndarray:
    """Random token ids: seed 0 is the clean prompts, 1 the corrupt ones."""
    return np.random.default_rng(seed).integers(vocab_size, size=shape)


def following(ids: np.ndarray) -> np.ndarray:
    """The next token of every position (of the last: the row's first)."""
    return np.roll(ids, -1, axis=1)
