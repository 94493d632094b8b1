"""Rows of the tables that weights alone decide: bigrams, what heads seek and what they write.

A table has V x V entries. Here rows are made on demand, and the largest entries of a row by pieces
of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.axes import Array, Float, Int, over
from arrakis_jax.checks import Ids, checked_choice, checked_count, checked_ids, host
from arrakis_jax.circuits.matrices import (
    Head,
    checked_distance,
    checked_head,
    of_head,
    ov_of,
    qk_of,
)
from arrakis_jax.errors import expected
from arrakis_jax.forward import compiled
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import contract
from arrakis_jax.residuals import Record

CHUNK = 8192  # tokens of the vocabulary at a time
SCALES = ("own", "one")


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class SkipTrigrams(Record):
    """A head's skip-trigrams `source ... destination -> output` of largest entries, for N sources.

    Attributes:
        source: `[N]`, token ids.
        destinations: the k tokens from which the head looks at the source most, and their scores.
        outputs: the k tokens whose logits it then raises most, and by how much.
    """

    source: Int[Array, " N"]
    destinations: TopTokens
    outputs: TopTokens


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
    writes is read by the final norm's gain (and centring), not divided by its scale nor by that of
    a norm of attention's output: divide by those of a forward for its share of logits. Centring
    of LayerNorm and gains are always folded in.

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
    checked_choice("scales", scales, SCALES)
    sources, positions = _checked_rows(model, sources, positions, "sources")
    return _ov_rows(model, *at, sources, positions, scales=scales)


@compiled("scales")
def _ov_rows(model, layer, head, sources, positions, *, scales):
    return _written_logits(model, _moved(model, layer, head, sources, positions, scales), None)


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
        distance: how far before the destination the source stands, of which RoPE's rotation
            depends; without RoPE nothing does.
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
    checked_choice("scales", scales, SCALES)
    _check_bilinear(model)
    looking = _checked_rows(model, destinations, destination_positions, "destinations")
    looked = _checked_rows(model, sources, source_positions, "sources")
    distance = checked_distance(distance)
    return _qk_entries(model, *at, looking, looked, distance, scales=scales)


@compiled("scales")
def _qk_entries(model, layer, head, destinations, sources, distance, *, scales):
    seek_NK = _seeking(model, layer, head, destinations, distance, scales, side="left")
    offer_MK = _seeking(model, layer, head, sources, distance, scales, side="right")
    return contract("NK,MK->NM", seek_NK, offer_MK) * _attention_scale(model, layer)


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
    of largest `ov_table[source, output]`; any of the one goes with any of the other. The
    vocabulary is taken by pieces.

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
        >>> found = skip_trigrams(model, (0, 3), [token_id(tokenizer, " Mary")], k=5)
        >>> found.destinations.tokens.shape, found.outputs.values.shape
        ((1, 5), (1, 5))

    Reference:
        Elhage et al. 2021, "Skip-Trigrams".
    """
    at = checked_head(model, head)
    checked_choice("scales", scales, SCALES)
    checked_count("k", k, model.config.vocab_size)
    _check_bilinear(model)
    sources = _checked_rows(model, sources, None, "sources")[0]
    distance = checked_distance(distance)
    return _trigrams(model, *at, sources, distance, k=k, scales=scales)


@compiled("k", "scales")
def _trigrams(model, layer, head, sources, distance, *, k, scales):
    v, n = model.config.vocab_size, len(sources)
    written_ND = _moved(model, layer, head, sources, None, scales)
    offer_NK = _seeking(model, layer, head, (sources, None), distance, scales, side="right")
    offer_NK = offer_NK * _attention_scale(model, layer)

    def looking(ids: Int[Array, " M"]) -> Float[Array, "N M"]:
        seek_MK = _seeking(model, layer, head, (ids, None), distance, scales, side="left")
        return contract("NK,MK->NM", offer_NK, seek_MK)

    return SkipTrigrams(
        source=sources,
        destinations=top_tokens(v, k, n, looking),
        outputs=top_tokens(v, k, n, lambda ids: _written_logits(model, written_ND, ids)),
    )


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


def _written_logits(model: Transformer, x_ND: Array, ids: Array | None) -> Float[Array, "N M"]:
    """What vectors in the stream add to the logits, times the final norm's scale."""
    if (norm := model.norm_final) is not None:
        x_ND = norm.gained(norm.centre(x_ND))
    return contract("ND,MD->NM", x_ND, model.unembedding(ids))


def _moved(
    model: Transformer, layer: Any, head: Any, tokens: Array, positions: Any, scales: str
) -> Float[Array, "N D"]:
    """What a head writes where it attends to these tokens."""
    ov = of_head(model, ov_of(model.config, fold=True, biases=True), layer, head)
    x_ND = _read(model, tokens, positions, scales)
    return contract("NK,KD->ND", _times(x_ND, ov.left), ov.right)


def _seeking(
    model: Transformer,
    layer: Any,
    head: Any,
    rows: tuple[Array, Any],
    distance: Array,
    scales: str,
    *,
    side: str,
) -> Float[Array, "N K"]:
    """A head's queries (left) or keys (right) of these tokens."""
    of = qk_of(model.config, distance, fold=True, biases=True)
    qk = of_head(model, of, layer, head)
    x_ND = _read(model, *rows, scales)
    return _times(x_ND, qk.left if side == "left" else qk.right.T)


def _read(model: Transformer, tokens: Array, positions: Any, scales: str) -> Float[Array, "N D"]:
    """Embeddings over the scale with which attention of a layer reads them."""
    x_ND, norm = _embedded(model, tokens, positions), model.parts()[0][0].norm_attn
    if norm is None or scales == "one" or model.config.norm_placement == "stream_after":
        return x_ND
    # The scale depends on no parameters, so that any layer's norm gives it.
    square = jnp.mean(jnp.square(norm.centre(x_ND)), -1, keepdims=True)
    return x_ND / jnp.sqrt(square + (norm.config.norm_eps or 0.0))


def _times(x_ND: Array, w: Float[Array, "D1 K"]) -> Float[Array, "N K"]:
    """`[x, 1] w`."""
    return contract("ND,DK->NK", x_ND, w[:-1]) + over(w[-1], x_ND)


def _attention_scale(model: Transformer, layer: Any) -> Array | float:
    config = model.config
    scale = config.d_head**-0.5 if config.attention_scale is None else config.attention_scale
    return scale / (layer + 1) if config.scale_by_inverse_layer else scale


def _check_bilinear(model: Transformer) -> None:
    if model.config.qk_norm is not None:
        got = f"one with qk_norm={model.config.qk_norm!r}"
        do = "use qk_matrices with the scales of a captured stream"
        must = "one whose scores are bilinear in the embeddings"
        raise ValueError(expected("model", must, got, do))


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
