"""The small trained model that is shipped with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arrakis_jax.checkpoint import from_pretrained
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.text import tokenizer_for

FOLDER = Path(__file__).parent / "model"


def demo_model() -> tuple[Transformer, Any]:
    """The shipped model and its tokenizer: `(model, tokenizer)`.

    A Llama of 4 layers, 4 heads and width 128, trained by `arrakis_jax/demo/train.py` on
    indirect-object sentences, subject-verb agreement and repeated random sequences. What it
    reaches is in `arrakis_jax/demo/model/figures.json`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> text = "When Mary and John went to the store, John gave a drink to"
        >>> tokens, mask = encode(tokenizer, text)
        >>> logits = run(model, tokens, mask=mask).logits
        >>> tokenizer.decode(int(logits[0, -1].argmax()))
        ' Mary'
    """
    return from_pretrained(FOLDER), tokenizer_for(FOLDER)
