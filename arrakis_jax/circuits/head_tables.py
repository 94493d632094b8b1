"""Rows of the tables of one head: which tokens it seeks, and what it makes of them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.circuits.bigrams import TopTokens, _checked_rows, _embedded, top_tokens
from arrakis_jax.circuits.matrices import (
    Head,
    checked_distance,
    checked_head,
    of_head,
    ov_of,
    qk_of,
)
from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.checks import Ids, checked_choice, checked_count
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record

SCALES = ("own", "one")


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
    x_ND, norm = _embedded(model, tokens, positions), model.stacks()[0][0].norm_attn
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
