"""Rows of the direct path from one token to the next: the bigrams that a model knows."""

from __future__ import annotations

import jax.numpy as jnp

from arrakis_jax.circuits.vocabulary import Rows, TopTokens, checked_rows, embedded_rows, top_tokens
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Ids, checked_count
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Transformer


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
        scale: what the final norm divides by in place of the embedding's own scale: a number, or
            `[N]`. With the scale of a forward (`norm_final_scale`) the rows are the direct path's
            share of that forward's logits, the readout's biases included.

    Returns:
        `[N,V]`.

    Raises:
        ValueError: for positions of a model that has none.

    Example:
        >>> model, tokenizer = demo_model()
        >>> bigram_logits(model, [3, 4]).shape
        (2, 451)

    Reference:
        Elhage et al. 2021, "Zero-Layer Transformers".
    """
    return _bigrams(model, checked_rows(model, tokens, positions, "tokens"), scale)


@compiled()
def _bigrams(model: Transformer, rows: Rows, scale: float | Array | None) -> Float[Array, "N V"]:
    return _logits(model, _normed(model, rows, scale), None)


def top_bigrams(
    model: Transformer,
    tokens: Ids,
    k: int = 10,
    *,
    positions: Ids | None = None,
    scale: float | Array | None = None,
) -> TopTokens:
    """The k largest logits of each row of `bigram_logits`, a chunk of the vocabulary at a time.

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
    return _top_bigrams(model, checked_rows(model, tokens, positions, "tokens"), scale, k=k)


@compiled("k")
def _top_bigrams(
    model: Transformer, rows: Rows, scale: float | Array | None, *, k: int
) -> TopTokens:
    y_ND = _normed(model, rows, scale)
    return top_tokens(model.config.vocab_size, k, len(y_ND), lambda ids: _logits(model, y_ND, ids))


def _normed(model: Transformer, rows: Rows, scale: float | Array | None) -> Float[Array, "N D"]:
    """The embedding through the final norm, with its own scale or with the one that is given."""
    x_ND, norm = embedded_rows(model, rows), model.norm_final
    if norm is None or scale is None:
        return model.final_norm(x_ND)
    # With the scale given, the norm is a linear map and a bias.
    scale = jnp.broadcast_to(jnp.asarray(scale, x_ND.dtype), x_ND.shape[:1])
    y_ND = norm.linear(x_ND) / scale[:, None]
    return y_ND if norm.b is None else y_ND + norm.b[...].astype(y_ND.dtype)[None]


def _logits(model: Transformer, y_ND: Array, ids: Array | None) -> Float[Array, "N M"]:
    """The logits of normed vectors, for these tokens or for all."""
    # None reads the unembedding as it is: gathering all ids would copy it.
    bias = model.unembedding_bias(jnp.arange(model.config.vocab_size) if ids is None else ids)
    return contract("ND,MD->NM", y_ND, model.unembedding(ids)) + bias[None]
