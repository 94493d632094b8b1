"""Trains the shipped model from nothing: `python -m arrakis_jax.demo.train`.

Writes the tokenizer, the weights in the Hugging Face layout of Llama, and the figures that the
model reaches. Needs the extra `train`; takes up to twenty minutes on two CPU cores.
"""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from rich.progress import track
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from arrakis_jax.checkpoint import export_weights
from arrakis_jax.core.axes import Array
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.demo import FOLDER, text
from arrakis_jax.demo.evaluate import figures
from arrakis_jax.families import config_for
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.text import tokenizer_for

BOS = "<bos>"
# The shape of a batch's text, and of its random sequences. Sequences are short in the first half of
# the training and fill the context in the second: a model that copies over short distances soon
# learns to copy over long ones.
TEXT, SHORT, LONG = (22, 64), (10, 64), (5, 128)
FEW_TOKENS = 40

# Muon treats each stacked parameter as a matrix: its input axes and its output axes.
MATRICES = {
    **dict.fromkeys(("w_q", "w_k", "w_v"), MuonDimensionNumbers(1, (2, 3))),
    "w_o": MuonDimensionNumbers((1, 2), 3),
    **dict.fromkeys(("w_in", "w_gate", "w_out"), MuonDimensionNumbers(1, 2)),
}


def build_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer in which every word of the text is one token with its space.

    Other words fall into bytes, so that any text can be encoded.
    """
    # Words are whole entries, found without merges. "Ġ" stands for the space in front.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = [BOS, *alphabet, *(f"Ġ{word}" for word in text.words() if len(word) > 1), "Ġa"]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "pad_token": BOS}
    _write(folder / "tokenizer_config.json", settings)


def text_rows(
    rng: np.random.Generator, tokenizer: Any, count: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of sentences after a BOS, and the weight of each token as a target.

    The token that follows from the sentence's meaning weighs most.
    """
    rows = np.zeros((count, width), np.int32)
    weights = np.zeros((count, width), np.float32)
    source = text.sentences(rng)
    for row, weight in zip(rows, weights, strict=True):
        # Sentences follow each other until the row is full; the last one is cut.
        row[0], at = tokenizer.bos_token_id, 1
        while at < width:
            prompt, rest = next(source)
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            after = tokenizer(rest, add_special_tokens=False).input_ids
            both = (ids + after)[: width - at]
            row[at : at + len(both)] = both
            weight[at : at + len(both)] = 0.1
            weight[at + len(ids) : at + len(ids) + 1] = 2.0
            at += len(both)
    return rows, weights


def repeated_rows(
    rng: np.random.Generator, ids: np.ndarray, count: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random sequences after a BOS, repeated to the row's end; each repeated token has a weight."""
    rows = np.zeros((count, width), np.int32)
    weights = np.zeros((count, width), np.float32)
    for row, weight in zip(rows, weights, strict=True):
        length = int(rng.integers(6, min((width - 1) // 2, len(ids)) + 1))
        row[1:] = np.resize(rng.choice(ids, length, replace=False), width - 1)
        # The first token of the second copy cannot be predicted, the next one can.
        weight[length + 2 :] = 1.0
    return rows, weights


def loss(model: Transformer, *parts: tuple[Array, Array]) -> Array:
    """The mean cross-entropy of the next token, weighted, over parts of rows and weights."""
    total = weight = jnp.zeros(())
    for rows, weights in parts:
        logits = model(rows[:, :-1], capture=("logits",)).logits
        each = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
        total += jnp.sum(each * weights[:, 1:])
        weight += jnp.sum(weights[:, 1:])
    return total / weight


def train(config: ModelConfig, tokenizer: Any, steps: int, seed: int) -> Transformer:
    """Muon, with AdamW for embeddings and norms, on batches of text and repeated sequences.

    At first the random sequences are made of few different tokens: an induction circuit forms only
    if it sees each token often, and then spreads to further tokens easily.
    """
    rng = np.random.default_rng(seed)
    model: Any = Transformer(config, rngs=nnx.Rngs(seed))
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            _schedule(2e-2, steps),
            weight_decay=0.03,
            adam_learning_rate=_schedule(3e-3, steps),
            adam_b2=0.98,
            adam_weight_decay=0.01,
            muon_weight_dimension_numbers=_matrices,
        ),
    )
    corpus = text_rows(rng, tokenizer, 60_000, TEXT[1])
    shuffled = rng.permutation(np.arange(1, config.vocab_size))

    @jax.jit
    def step(model: Any, state: Any, *parts: tuple[Array, Array]) -> tuple:
        value, gradient = jax.value_and_grad(loss)(model, *parts)
        update, state = optimiser.update(gradient, state, model)
        return optax.apply_updates(model, update), state, value

    state = optimiser.init(model)
    for done in track(range(steps), "training"):
        # From few tokens to the whole vocabulary, geometrically, over the first 40 % of the steps.
        part = min(1.0, done / (0.4 * steps))
        count = round(FEW_TOKENS * (shuffled.size / FEW_TOKENS) ** part)
        chosen = rng.integers(len(corpus[0]), size=TEXT[0])
        written = tuple(part[chosen] for part in corpus)
        random = repeated_rows(rng, shuffled[:count], *(SHORT if done < steps // 2 else LONG))
        model, state, value = step(model, state, written, random)
        if done % 500 == 499:
            print(f"step {done + 1}: loss {value:.3f}")
    return model


def _schedule(peak: float, steps: int) -> optax.Schedule:
    """A short warm-up, then a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 50, steps, peak / 100)


def _matrices(params: Any) -> Any:
    """For each parameter, the matrix that Muon trains; None for those that AdamW trains."""

    def numbers(path: tuple, _: Array) -> MuonDimensionNumbers | None:
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        return MATRICES.get(name.split(".")[-1])

    return jax.tree_util.tree_map_with_path(numbers, params)


def train_demo(
    out: Annotated[Path, typer.Option(help="folder to write")] = FOLDER,
    seed: int = 0,
    steps: int = 4000,
) -> None:
    """Builds the tokenizer, trains, measures and writes."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    build_tokenizer(out)
    tokenizer = tokenizer_for(out)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": LONG[1],
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "bos_token_id": tokenizer.bos_token_id,
        "tie_word_embeddings": False,
    }
    model = train(config_for("llama", **settings), tokenizer, steps, seed)
    seconds = round(time.monotonic() - began)
    save_file(export_weights("llama", model), out / "model.safetensors", {"format": "pt"})
    _write(
        out / "config.json",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **settings},
    )
    reached = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        **figures(model, tokenizer),
        "training": {"steps": steps, "seed": seed, "seconds": seconds},
    }
    _write(out / "figures.json", reached)
    print(json.dumps(reached, indent=1))


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(train_demo)
