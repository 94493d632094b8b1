"""The matrices of a head's circuits, as two thin factors: what it moves (OV), what it seeks (QK).

Elhage et al. 2021. No D x D matrix is formed: everything comes from the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from arrakis_jax.circuits.factored import Factored
from arrakis_jax.circuits.heads import HeadIndex
from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import host
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.rotary import rotate
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Walked, all_at_once, at_layer
from arrakis_jax.stream.padding import Padding

Distance = int | Int[Array, " N"] | np.ndarray | list
OfLayer = Callable[[Block, Array], Factored]


def ov_matrices(model: Transformer, *, fold: bool = True, biases: bool = False) -> Factored:
    """What every head moves: `W_V W_O`, from the source's normed stream to what it writes.

    Head h writes `sum_j pattern[i,j] (x_j / s_j) left right` at position i, where s is the scale
    of the norm before attention (1 without one). `left` is `W_V` of the head's key/value head, so
    that heads of a group share it, and `right` is `W_O`.

    Args:
        model: the transformer, whose weights are not changed.
        fold: fold in what surrounds the weights. Into the rows of `W_V` the gain of the norm
            before attention, and its centring (LayerNorm). Into the columns of `W_O` centring and
            gain of a norm of attention's output or, with `norm_placement="stream_after"`, of the
            norm of the stream that follows, and `residual_scale`. Not the norms' scales, which
            depend on the text: multiply by those of a captured stream. False: weights as they are.
        biases: append a row to `left`, so that it takes `[x / s, 1]`: the norm's bias through
            `W_V`, plus `b_V`. The output's bias belongs to no head and is left out.

    Returns:
        Factored `[L,H,D,K]` (with biases `[L,H,D+1,K]`) and `[L,H,K,D]`, in float32 or wider.
        `clip_qkv` is ignored.

    Example:
        >>> model, tokenizer = demo_model()
        >>> ov_matrices(model)
        Factored(left=float32[4, 4, 128, 64], right=float32[4, 4, 64, 128])

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    return _ov(model, fold=bool(fold), biases=bool(biases))


@compiled("fold", "biases")
def _ov(model: Transformer, *, fold: bool, biases: bool) -> Factored:
    return _every_layer(model, ov_of_layer(model.config, fold=fold, biases=biases))


def ov_of_layer(config: ModelConfig, *, fold: bool, biases: bool) -> OfLayer:
    """`ov_matrices` of one layer, from its block and its index: `[H,D,K]` and `[H,K,D]`."""
    repeats = config.heads_per_group
    after = config.norm_placement == "stream_after"

    def of(block: Block, _: Array) -> Factored:
        norm = block.norm_attn if fold and not after else None
        w_v = _read_through(norm, block.attn.w_v[...], block.attn.b_v, biases=biases)
        w_o = block.attn.w_o[...].astype(config.acc)
        if fold:
            # Outputs pass their own norm first, then the norm of the sum that they join.
            for written in (block.norm_attn_out, block.norm_attn if after else None):
                w_o = w_o if written is None else written.linear(w_o)
            w_o = w_o * config.residual_scale
        return Factored(left=repeat(w_v, "D G K -> (G R) D K", R=repeats), right=w_o)

    return of


def qk_matrices(
    model: Transformer, *, distance: Distance = 0, fold: bool = True, biases: bool = False
) -> Factored:
    """What every head seeks: `W_Q R W_K^T`, from query stream to key stream.

    The score of the query at position i and the key at j, `distance = i - j` before it, is
    `(x_i / s_i) left right (x_j / s_j)^T`, with s the scale of the norm before attention. What
    multiplies scores after that is left out: the attention scale, a soft-cap, ALiBi's bias.
    R is RoPE's rotation over that distance, as each layer has it, `attention_factor` squared
    included; partial rotary leaves the other dimensions alone. Without RoPE R is the identity.

    Args:
        model: the transformer, whose weights are not changed.
        distance: i - j, an int >= 0, or several, `[N]`, over which the matrix is averaged. New
            values do not recompile.
        fold: fold in the norm before attention, as `ov_matrices` does, and the gain and centring
            of a norm of queries and keys (`qk_norm`). With that norm scores are not bilinear:
            divide by its scales as well, `norm_q_scale` at i and `norm_k_scale` at j. False:
            weights as they are, and RoPE.
        biases: append a row to `left` and a column to `right`, so that they take `[x / s, 1]`:
            the norm's bias through `W_Q`, plus `b_Q`, and the same of the keys. Scores with the
            scales of a captured stream are then exact.

    Returns:
        Factored `[L,H,D,K]` and `[L,H,K,D]` (with biases D + 1), in float32 or wider. `clip_qkv`
        is ignored. Scalings of RoPE that depend on the length of the text ("dynamic", "longrope")
        are those of a text of `max(distance) + 1` tokens.

    Raises:
        TypeError, ValueError: a distance that is not an integer, or negative; biases of a model
            whose norm of queries and keys has a bias itself (no row can hold that one).

    Example:
        >>> model, tokenizer = demo_model()
        >>> qk_matrices(model, distance=1).frobenius().shape
        (4, 4)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    distance = checked_distance(distance)
    config = model.config
    biased = config.qk_norm_bias and config.norm_bias and config.norm == "layernorm"
    if biases and fold and biased and config.qk_norm is not None:
        do = "leave biases out, or fold=False"
        got = "True, and biases in its norm of queries and keys"
        raise ValueError(expected("biases", "False for this model", got, do))
    return _qk(model, distance, fold=bool(fold), biases=bool(biases))


def checked_distance(distance: Any) -> Array:
    """Distances `[N]` of a query to a key before it."""
    try:
        array = distance if isinstance(distance, jax.Array) else np.asarray(distance)
    except ValueError:
        array = np.asarray(None)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        do = "count positions from the key to the query"
        raise TypeError(expected("distance", "an int, or ints `[N]`", repr(distance), do))
    if array.ndim > 1 or array.size == 0:
        got, do = f"shape {array.shape}", "give one, or several to average over"
        raise ValueError(expected("distance", "an int, or ints `[N]`", got, do))
    values = host(array)
    if values is not None and (values < 0).any():
        do = "attention is causal: a query reads keys at or before it"
        raise ValueError(expected("distance", "at least 0", int(values.min()), do))
    return jnp.asarray(array, jnp.int32).reshape(-1)


@compiled("fold", "biases")
def _qk(model: Transformer, distance: Int[Array, " N"], *, fold: bool, biases: bool) -> Factored:
    return _every_layer(model, qk_of_layer(model.config, distance, fold=fold, biases=biases))


def qk_of_layer(
    config: ModelConfig, distance: Int[Array, " N"], *, fold: bool, biases: bool
) -> OfLayer:
    """`qk_matrices` of one layer, from its block and its index."""
    repeats = config.heads_per_group
    rotations_of = _rotations(config, distance)

    def of(block: Block, layer: Array) -> Factored:
        attn = block.attn
        norm = block.norm_attn if fold and config.norm_placement != "stream_after" else None
        q = _read_through(norm, attn.w_q[...], attn.b_q, biases=biases)
        k = _read_through(norm, attn.w_k[...], attn.b_k, biases=biases)
        # Gain and centring are linear and fold in; the scales of these norms depend on the text.
        if fold and attn.norm_q is not None and attn.norm_k is not None:
            q, k = attn.norm_q.linear(q), attn.norm_k.linear(k)
        if rotations_of is not None:
            # D stands where `rotate` has T; the single rotation broadcasts over it.
            of_query, of_key = rotations_of(layer)
            q = rotate(q, *of_query, interleaved=config.rope_interleaved)
            k = rotate(k, *of_key, interleaved=config.rope_interleaved)
        left, right = rearrange(q, "D H K -> H D K"), repeat(k, "D G K -> (G R) K D", R=repeats)
        return Factored(left=left, right=right)

    return of


def _rotations(config: ModelConfig, distance: Int[Array, " N"]) -> Callable | None:
    """The rotations of a query and of a key by layer, each a cosine and a sine `[1,K/2]`.

    The key stands at position 0, the query at the distances, over which its rotation is averaged.
    """
    # As one row without padding: RoPE that scales with length sees the longest distance.
    position = jnp.append(distance, 0)[None]
    padding = Padding(None, position, position.max(-1) + 1)
    contexts = AttentionContexts.of(config, padding)
    if contexts.rotations is None:
        return None

    def of(layer: Array) -> tuple[list[Array], list[Array]]:
        rotation = contexts.at(layer).rotation
        assert rotation is not None
        # A mean of rotations turns no vector, but scores are linear in it: so their mean is exact.
        return [jnp.mean(x[:, :-1], 1) for x in rotation], [x[:, -1] for x in rotation]

    return of


def _read_through(
    norm: Norm | None, w_DNK: Array, bias: Any, *, biases: bool
) -> Float[Array, "D N K"]:
    """Weights that read the stream over its norm's scale; with biases in a last row, D + 1."""
    acc = jnp.promote_types(w_DNK.dtype, jnp.float32)
    w_NKD = rearrange(w_DNK.astype(acc), "D N K -> N K D")  # the norm's axis must be the last
    row_NK = jnp.zeros(w_NKD.shape[:2], acc) if bias is None else bias[...].astype(acc)
    if norm is not None:
        if norm.b is not None:  # the norm adds its bias after the division: it has no scale
            row_NK = row_NK + contract("NKD,D->NK", w_NKD, norm.b[...])
        w_NKD = norm.transposed(w_NKD)
    w_DNK = rearrange(w_NKD, "N K D -> D N K")
    return jnp.concatenate([w_DNK, row_NK[None]]) if biases else w_DNK


def of_head(model: Transformer, of: OfLayer, head: HeadIndex) -> Factored:
    """A function of one layer's block, at one layer and head: no other layer's are made."""
    layer, index = head
    return at_layer(model, lambda block, layer: of(block, layer)[index], layer)


def _every_layer(model: Transformer, of: OfLayer) -> Factored:
    """A function of one layer's block, over all layers."""
    # Not in a scan, which would copy the weights that are handed on as they are.
    by_segment = all_at_once(model, lambda place, _: of(place.block, place.index))
    return Walked(None, by_segment).found
