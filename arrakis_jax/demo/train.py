"""Trains the shipped model from nothing: `python -m arrakis_jax.demo.train`.

Writes the tokenizer, the weights in the Hugging Face layout of Llama, and the figures that the
model reaches. Needs the extra `train`; takes some fifteen minutes on two CPU cores.
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
from rich.progress import track
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from arrakis_jax.axes import Array
from arrakis_jax.checkpoint import export_weights
from arrakis_jax.config import ModelConfig
from arrakis_jax.demo import FOLDER, text
from arrakis_jax.demo.evaluate import figures
from arrakis_jax.families import config_for
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.tokens import tokenizer_for

BOS = "<bos>"
WIDTH, BATCH = 64, 32
FEW_TOKENS = 40


def build_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer in which every word of the text is one token with its space.

    Anything else falls into bytes, so that any text can be encoded.
    """
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
    rng: np.random.Generator, tokenizer: Any, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of sentences after a BOS, and the weight of each token as a target.

    The token that only the sentence's meaning decides weighs most.
    """
    rows = np.zeros((count, WIDTH), np.int32)
    weights = np.zeros((count, WIDTH), np.float32)
    source = text.sentences(rng)
    for row, weight in zip(rows, weights, strict=True):
        row[0], at = tokenizer.bos_token_id, 1
        while at < WIDTH:
            prompt, rest = next(source)
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            after = tokenizer(rest, add_special_tokens=False).input_ids
            both = (ids + after)[: WIDTH - at]
            row[at : at + len(both)] = both
            weight[at : at + len(both)] = 0.1
            weight[at + len(ids) : at + len(ids) + 1] = 2.0
            at += len(both)
    return rows, weights


def repeated_rows(rng: np.random.Generator, ids: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
    """Random sequences after a BOS, repeated to the row's end; all repetitions weigh."""
    rows = np.zeros((count, WIDTH), np.int32)
    weights = np.zeros((count, WIDTH), np.float32)
    for row, weight in zip(rows, weights, strict=True):
        length = int(rng.integers(6, (WIDTH - 1) // 2 + 1))
        row[1:] = np.resize(rng.choice(ids, length, replace=False), WIDTH - 1)
        weight[length + 2 :] = 1.0
    return rows, weights


def loss(model: Transformer, rows: Array, weights: Array) -> Array:
    """The weighted mean cross-entropy of the next token."""
    logits = model(rows[:, :-1], capture=("logits",)).logits
    each = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    return jnp.sum(each * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def train(config: ModelConfig, tokenizer: Any, steps: int, seed: int) -> Transformer:
    """AdamW with a warm-up and a cosine; half of each batch is text, half repeated sequences.

    The random sequences are made of few different tokens at first: an induction circuit needs many
    sights of each token to form, and spreads to further tokens easily once it is there.
    """
    rng = np.random.default_rng(seed)
    model: Any = Transformer(config, rngs=nnx.Rngs(seed))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, steps // 50, steps, 1e-5)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05)
    )
    corpus = text_rows(rng, tokenizer, 30_000)
    shuffled = rng.permutation(np.arange(1, config.vocab_size))

    @jax.jit
    def step(model: Any, state: Any, rows: Array, weights: Array) -> tuple:
        value, gradient = jax.value_and_grad(loss)(model, rows, weights)
        update, state = optimiser.update(gradient, state, model)
        return optax.apply_updates(model, update), state, value

    state = optimiser.init(model)
    for done in track(range(steps), "training"):
        part = min(1.0, done / (0.4 * steps))
        count = round(FEW_TOKENS * (shuffled.size / FEW_TOKENS) ** part)
        chosen = rng.integers(len(corpus[0]), size=BATCH // 2)
        random = repeated_rows(rng, shuffled[:count], BATCH // 2)
        batch = (np.concatenate([c[chosen], r]) for c, r in zip(corpus, random, strict=True))
        model, state, value = step(model, state, *batch)
        if done % 500 == 499:
            print(f"step {done + 1}: loss {value:.3f}")
    return model


def main(
    out: Annotated[Path, typer.Option(help="folder to write")] = FOLDER,
    seed: int = 0,
    steps: int = 7500,
) -> None:
    """Builds the tokenizer, trains, measures and writes."""
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    build_tokenizer(out)
    tokenizer = tokenizer_for(out)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
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
    typer.run(main)
