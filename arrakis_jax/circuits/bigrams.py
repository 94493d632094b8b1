"""Rows of the direct path from one token to the next, and the largest entries of a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import Ids, checked_count, checked_ids, host
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record

CHUNK = 8192  # tokens of the vocabulary at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class TopTokens(Record):
    """The largest entries of each of N rows of a table, in descending order.

    Attributes:
        tokens: `[N,k]`, their columns, token ids.
        values: `[N,k]`, the entries.
    """

    tokens: Int[Array, "N k"]
    values: Float[Array, "N k"]


def bigram_logits(
    model: Transformer,
    tokens: Ids,
    *,
    positions: Ids | None = None,
    scale: float | Array | None = None,
) -> Float[Array, "N V"]:
    """Rows of the direct path `W_E W_U`: the next token's logits from the current one alone.

    `logits[n] = norm_f(e(t_n)) W_U + b_U`: what the model computes without its layers. Before a
    soft-cap, factors on the logits included.

    Args:
        model: the transformer.
        tokens: `[N]` token ids, or one.
        positions: learned positions to add, `[N]` or one; None adds none.
        scale: what the final norm divides by in place of the embedding's own scale, a number or
            `[N]`, such as those of a forward (`norm_final_scale`): then the rows are the
            direct path's share of its logits, biases of the readout included.

    Returns:
        `[N,V]`.

    Raises:
        ValueError: positions of a model that has none.

    Example:
        >>> model, tokenizer = demo_model()
        >>> bigram_logits(model, [3, 4]).shape
        (2, 451)

    Reference:
        Elhage et al. 2021, "Zero-Layer Transformers".
    """
    tokens, positions = _checked_rows(model, tokens, positions, "tokens")
    return _bigrams(model, tokens, positions, scale)


@compiled()
def _bigrams(model, tokens, positions, scale):
    return _logits(model, _direct(model, tokens, positions, scale), None)


def top_bigrams(
    model: Transformer,
    tokens: Ids,
    k: int = 10,
    *,
    positions: Ids | None = None,
    scale: float | Array | None = None,
) -> TopTokens:
    """The k largest logits of each row of `bigram_logits`, the vocabulary taken by pieces.

    Args:
        model: the transformer.
        tokens: `[N]` token ids, or one.
        k: how many, at most V.
        positions: as in `bigram_logits`.
        scale: as in `bigram_logits`.

    Returns:
        TopTokens, `[N,k]`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> top_bigrams(model, [token_id(tokenizer, " gave")], 3)
        TopTokens(tokens=int32[1, 3], values=float32[1, 3])
    """
    checked_count("k", k, model.config.vocab_size)
    tokens, positions = _checked_rows(model, tokens, positions, "tokens")
    return _top_bigrams(model, tokens, positions, scale, k=k)


@compiled("k")
def _top_bigrams(model, tokens, positions, scale, *, k):
    y_ND = _direct(model, tokens, positions, scale)
    return top_tokens(model.config.vocab_size, k, len(y_ND), lambda ids: _logits(model, y_ND, ids))


def top_tokens(
    vocab_size: int,
    k: int,
    n_rows: int,
    entries: Callable[[Int[Array, " M"]], Float[Array, "N M"]],
    chunk: int = CHUNK,
) -> TopTokens:
    """The k largest of `entries(ids) [N,M]` over all token ids, some of them at a time."""
    chunk = min(chunk, vocab_size)
    starts = jnp.arange(0, vocab_size, chunk)
    dtype = jax.eval_shape(entries, jax.ShapeDtypeStruct((1,), jnp.int32)).dtype
    empty = (jnp.full((n_rows, k), -jnp.inf, dtype), jnp.zeros((n_rows, k), jnp.int32))

    def step(best: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        ids = start + jnp.arange(chunk, dtype=jnp.int32)
        inside = ids < vocab_size
        found = jnp.where(inside[None], entries(jnp.where(inside, ids, 0)), -jnp.inf)
        values = jnp.concatenate([best[0], found], 1)
        tokens = jnp.concatenate([best[1], jnp.broadcast_to(ids[None], found.shape)], 1)
        values, index = jax.lax.top_k(values, k)
        return (values, jnp.take_along_axis(tokens, index, 1)), None

    values, tokens = jax.lax.scan(step, empty, starts.astype(jnp.int32))[0]
    return TopTokens(tokens=tokens, values=values)


def _embedded(model: Transformer, tokens: Array, positions: Array | None) -> Array:
    """`[N,D]`, what the stream holds of tokens at learned positions, or without any."""
    x_ND = model.embed_tokens(tokens)
    return x_ND if positions is None else x_ND + model.embed_positions(positions)


def _direct(model: Transformer, tokens: Array, positions: Any, scale: Any) -> Array:
    """`[N,D]`, what the unembedding reads of the embedding."""
    x_ND, norm = _embedded(model, tokens, positions), model.norm_final
    if norm is None or scale is None:
        return model.final_norm(x_ND)
    scale = jnp.broadcast_to(jnp.asarray(scale, x_ND.dtype), x_ND.shape[:1])
    y_ND = norm.gained(norm.centre(x_ND)) / scale[:, None]
    return y_ND if norm.b is None else y_ND + norm.b[...].astype(y_ND.dtype)[None]


def _logits(model: Transformer, y_ND: Array, ids: Array | None) -> Float[Array, "N M"]:
    """The logits of normed vectors, of these tokens or of all."""
    bias = model.unembedding_bias(jnp.arange(model.config.vocab_size) if ids is None else ids)
    return contract("ND,MD->NM", y_ND, model.unembedding(ids)) + bias[None]


def _checked_rows(model: Transformer, ids: Any, positions: Any, name: str) -> tuple[Array, Any]:
    """Token ids and positions as `[N]`; one of them alone as N = 1."""
    shape = np.shape(ids) or (1,)
    if len(shape) != 1:
        do = "flatten them"
        raise ValueError(expected(name, "an int or `[N]`", f"shape {shape}", do))
    tokens = checked_ids(model.config, ids, shape, name=name)
    if positions is None:
        return tokens, None
    if model.config.positions != "learned":
        got = f"positions for a model with positions={model.config.positions!r}"
        do = "leave them out"
        raise ValueError(expected("positions", "None without learned ones", got, do))
    given = np.asarray(positions) if host(positions) is not None else positions
    if given.shape not in ((), shape) or not jnp.issubdtype(given.dtype, jnp.integer):
        got, do = f"{given.dtype} of shape {given.shape}", "give one for all, or one each"
        raise ValueError(expected("positions", f"an int or ints of shape {shape}", got, do))
    values, most = host(given), model.config.max_positions
    if values is not None and ((values < 0) | (values >= most)).any():
        do = "this model has no others"
        raise IndexError(expected("positions", f"in [0, {most})", values.ravel()[:3].tolist(), do))
    return tokens, jnp.broadcast_to(jnp.asarray(given, jnp.int32), shape)
