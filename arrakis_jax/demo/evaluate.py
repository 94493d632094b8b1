"""How well the shipped model does on text that was held out of its training."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from arrakis_jax.demo import text
from arrakis_jax.forward.run import run
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.stream.capture import Capture
from arrakis_jax.text import encode

SEED = 20_000
PROMPTS = 1000
SEQUENCES, LENGTH = 32, 25


def figures(model: Transformer, tokenizer: Any) -> dict[str, Any]:
    """Accuracies over the whole vocabulary, per order, and the best induction head.

    The pairs of names and both clauses of the indirect-object prompts are not in the training text.
    A head's induction score is the mean of `pattern[q, q - N + 1]` over queries q in the second
    copy of N random tokens (Elhage et al. 2021).
    """
    rng = np.random.default_rng(SEED)
    accuracy = {
        order: _accuracy(
            model,
            tokenizer,
            [text.indirect_object(rng, order=order, held_out=True) for _ in range(PROMPTS)],
        )
        for order in ("ABBA", "BABA")
    }
    agrees = _accuracy(model, tokenizer, [text.subject_verb(rng) for _ in range(PROMPTS)])
    score_LH = induction_scores(model, tokenizer.bos_token_id, rng)
    layer, head = np.unravel_index(score_LH.argmax(), score_LH.shape)
    return {
        "indirect_object": {**accuracy, "prompts_per_order": PROMPTS},
        "agreement": agrees,
        "induction": {
            "score": float(score_LH.max()),
            "layer": int(layer),
            "head": int(head),
        },
    }


def induction_scores(model: Transformer, bos: int, rng: np.random.Generator) -> np.ndarray:
    """The induction score of every head, `[L,H]`."""
    # Any token but the BOS, which marks the start of a text.
    ids = np.delete(np.arange(model.config.vocab_size), bos)
    rows = [[bos, *text.repeated(rng, ids, LENGTH)] for _ in range(SEQUENCES)]
    stream = run(model, np.array(rows), capture=("pattern",)).residuals
    queries = np.arange(LENGTH + 1, 2 * LENGTH + 1)
    return np.asarray(stream.pattern[..., queries, queries - LENGTH + 1].mean((1, 3)))


def _accuracy(model: Transformer, tokenizer: Any, prompts: list[text.Prompt]) -> float:
    tokens, mask = encode(tokenizer, [prompt.text for prompt in prompts])
    last = Capture(("logits",), positions=(-1,))
    logits = run(model, tokens, mask=mask, capture=last).logits
    # Texts are compared, since an answer is given as text.
    guess = [tokenizer.decode([i]) for i in np.asarray(jnp.argmax(logits[:, 0], -1))]
    return float(np.mean([g == p.answer for g, p in zip(guess, prompts, strict=True)]))
