"""Rows of the tables of one head: which tokens it seeks, and what it makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arrakis_jax.circuits.heads import Head, HeadIndex, check_bilinear, checked_head
from arrakis_jax.circuits.matrices import checked_distance, of_head, ov_of_layer, qk_of_layer
from arrakis_jax.circuits.vocabulary import Rows, TopTokens, checked_rows, embedded_rows, top_tokens
from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.checks import Ids, checked_choice, checked_count
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import at_layer
from arrakis_jax.results.record import Record

_SCALES = ("own", "one")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class SkipTrigrams(Record):
    """A head's skip-trigrams `source ... destination -> output` of largest entries, for N sources.

    Attributes:
        source: `[N]`, token ids.
        destinations: the k tokens that look at the source most, and their scores.
        outputs: the k tokens whose logits the head then raises most, and by how much.
    """

    source: Int[Array, " N"]
    destinations: TopTokens
    outputs: TopTokens


def ov_table(
    model: Transformer,
    head: Head,
    sources: Ids,
    *,
    positions: Ids | None = None,
    scales: str = "own",
) -> Float[Array, "N V"]:
    """Rows of a head's full OV circuit `W_E W_OV W_U`: what attending to a token does to logits.

    The embedding goes through the norm before attention and the value bias; what the head then
    writes is read through the final norm's gain and centring. Gains and LayerNorm's centring are
    always folded in. Rows are not divided by the scales of the final norm and of a norm of
    attention's output: divide them by those of a forward to have the head's share of its logits.

    Args:
        model: the transformer, of any depth.
        head: `(layer, head)`, ints in [-L, L) and [-H, H), or traced scalars.
        sources: `[N]` token ids, or one.
        positions: learned positions to add, `[N]` or one; None adds none.
        scales: "own" divides by the scale of the embedding itself, so that rows are exact in layer
            0; "one" divides by nothing.

    Returns:
        `[N,V]`.

    Raises:
        IndexError: if there is no such layer or head.
        ValueError: for positions of a model that has none, or other scales.

    Example:
        >>> model, tokenizer = demo_model()
        >>> ov_table(model, (2, 0), [3, 4]).shape
        (2, 451)

    Reference:
        Elhage et al. 2021, "One-Layer Attention-Only Transformers".
    """
    at = checked_head(model, head)
    checked_choice("scales", scales, _SCALES)
    rows = checked_rows(model, sources, positions, "sources")
    return _ov_rows(model, at, rows, scales=scales)


@compiled("scales")
def _ov_rows(
    model: Transformer, head: HeadIndex, sources: Rows, *, scales: str
) -> Float[Array, "N V"]:
    return _logits(model, _moved(model, head, sources, scales), None)


def qk_table(
    model: Transformer,
    head: Head,
    destinations: Ids,
    sources: Ids,
    *,
    distance: int | Int[Array, ""] = 0,
    destination_positions: Ids | None = None,
    source_positions: Ids | None = None,
    scales: str = "own",
) -> Float[Array, "N M"]:
    """Entries of a head's QK circuit `W_E W_QK W_E^T`: how much each token looks at each other.

    Scores as they enter the softmax, times the attention scale, biases of queries and keys
    included; before a soft-cap and ALiBi's bias.

    Args:
        model: the transformer, of any depth.
        head: `(layer, head)`, ints in [-L, L) and [-H, H), or traced scalars.
        destinations: `[N]` token ids that look, or one.
        sources: `[M]` token ids that are looked at, or one.
        distance: how far before the destination the source stands. RoPE's rotation depends on it;
            without RoPE nothing does.
        destination_positions: learned positions to add, `[N]` or one; None adds none.
        source_positions: the same for sources, `[M]`.
        scales: "own" divides by the scale of the embedding itself, so that entries are exact in
            layer 0; "one" divides by nothing.

    Returns:
        `[N,M]`.

    Raises:
        IndexError: if there is no such layer or head.
        ValueError: for positions of a model that has none, other scales, or a norm of queries and
            keys (`qk_norm`), with which there is no such table.

    Example:
        >>> model, tokenizer = demo_model()
        >>> qk_table(model, (1, 2), [3, 4], [5, 6, 7], distance=1).shape
        (2, 3)

    Reference:
        Elhage et al. 2021, "One-Layer Attention-Only Transformers".
    """
    at = checked_head(model, head)
    checked_choice("scales", scales, _SCALES)
    check_bilinear(model.config)
    queries = checked_rows(model, destinations, destination_positions, "destinations")
    keys = checked_rows(model, sources, source_positions, "sources")
    return _qk_entries(model, at, queries, keys, checked_distance(distance), scales=scales)


@compiled("scales")
def _qk_entries(
    model: Transformer,
    head: HeadIndex,
    destinations: Rows,
    sources: Rows,
    distance: Int[Array, " N"],
    *,
    scales: str,
) -> Float[Array, "N M"]:
    qk = of_head(model, qk_of_layer(model.config, distance, fold=True, biases=True), head)
    # W_QK as factors: rows of the left are read by queries, columns of the right by keys.
    query_NK = _times(_read(model, destinations, scales), qk.left)
    key_MK = _times(_read(model, sources, scales), qk.right.T)
    return contract("NK,MK->NM", query_NK, key_MK) * model.config.score_scale(head[0])


def skip_trigrams(
    model: Transformer,
    head: Head,
    sources: Ids,
    k: int = 10,
    *,
    distance: int | Int[Array, ""] = 1,
    scales: str = "own",
) -> SkipTrigrams:
    """A head's skip-trigrams `source ... destination -> output`, of largest QK and OV entries.

    For each source the k destinations of largest `qk_table[destination, source]` and the k outputs
    of largest `ov_table[source, output]`; each destination goes with each output. Only a chunk of
    the vocabulary is looked at at a time.

    Args:
        model: the transformer, of any depth; exact in layer 0.
        head: `(layer, head)`, ints in [-L, L) and [-H, H), or traced scalars.
        sources: `[N]` token ids, or one.
        k: how many destinations and outputs, at most V.
        distance: from source to destination, as in `qk_table`.
        scales: as in `qk_table`.

    Returns:
        SkipTrigrams of `[N,k]` arrays.

    Raises:
        IndexError, ValueError: as `qk_table` and `ov_table`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> trigrams = skip_trigrams(model, (0, 3), [token_id(tokenizer, " Mary")], k=5)
        >>> trigrams.destinations.tokens.shape, trigrams.outputs.values.shape
        ((1, 5), (1, 5))

    Reference:
        Elhage et al. 2021, "Skip-Trigrams".
    """
    at = checked_head(model, head)
    checked_choice("scales", scales, _SCALES)
    checked_count("k", k, model.config.vocab_size)
    check_bilinear(model.config)
    rows = checked_rows(model, sources, None, "sources")
    return _trigrams(model, at, rows, checked_distance(distance), k=k, scales=scales)


@compiled("k", "scales")
def _trigrams(
    model: Transformer,
    head: HeadIndex,
    sources: Rows,
    distance: Int[Array, " N"],
    *,
    k: int,
    scales: str,
) -> SkipTrigrams:
    # What sources offer and write is made once, and meets the vocabulary a chunk at a time.
    config, tokens = model.config, sources[0]
    written_ND = _moved(model, head, sources, scales)
    qk = of_head(model, qk_of_layer(config, distance, fold=True, biases=True), head)
    key_NK = _times(_read(model, sources, scales), qk.right.T) * config.score_scale(head[0])

    def looking(ids: Int[Array, " M"]) -> Float[Array, "N M"]:
        return contract("NK,MK->NM", key_NK, _times(_read(model, (ids, None), scales), qk.left))

    def raised(ids: Int[Array, " M"]) -> Float[Array, "N M"]:
        return _logits(model, written_ND, ids)

    return SkipTrigrams(
        source=tokens,
        destinations=top_tokens(config.vocab_size, k, len(tokens), looking),
        outputs=top_tokens(config.vocab_size, k, len(tokens), raised),
    )


def _logits(model: Transformer, x_ND: Array, ids: Array | None) -> Float[Array, "N M"]:
    """What vectors in the stream add to the logits, times the final norm's scale."""
    if (norm := model.norm_final) is not None:
        x_ND = norm.linear(x_ND)
    return contract("ND,MD->NM", x_ND, model.unembedding(ids))


def _moved(model: Transformer, head: HeadIndex, rows: Rows, scales: str) -> Float[Array, "N D"]:
    """What a head writes where it attends to these tokens."""
    ov = of_head(model, ov_of_layer(model.config, fold=True, biases=True), head)
    return contract("NK,KD->ND", _times(_read(model, rows, scales), ov.left), ov.right)


def _read(model: Transformer, rows: Rows, scales: str) -> Float[Array, "N D"]:
    """Embeddings, divided by the scale with which attention reads them if that is asked for."""
    x_ND = embedded_rows(model, rows)
    # The scale depends on no parameters, so that the norm of the first layer gives it for all.
    norm = at_layer(model, lambda block, _: block.norm_attn, 0)
    if norm is None or scales == "one" or model.config.norm_placement == "stream_after":
        return x_ND
    square = jnp.mean(jnp.square(norm.centre(x_ND)), -1, keepdims=True)
    return x_ND / jnp.sqrt(square + (norm.config.norm_eps or 0.0))


def _times(x_ND: Array, w: Float[Array, "D1 K"]) -> Float[Array, "N K"]:
    """`[x, 1] w`, without the column of ones: the last row of w is a bias."""
    return contract("ND,DK->NK", x_ND, w[:-1]) + over(w[-1], x_ND)
