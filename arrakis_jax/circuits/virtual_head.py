"""Two heads in a row, taken as one."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arrakis_jax.circuits.factored import Factored
from arrakis_jax.circuits.heads import HEAD_FIELDS, Head, HeadIndex, check_linear, checked_head
from arrakis_jax.circuits.matrices import of_head, ov_of_layer
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Mask, Tokens
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class VirtualHead(Record):
    """Two heads in a row as one: it writes `sum_j weight[i,j] x_j ov`, of the stream x.

    x is the stream that enters the first head's layer, without biases of norms and values.

    Attributes:
        pattern: `[B,T,S]`, `A_second A_first`: how position i looks at j through both.
        weight: `[B,T,S]`, the same over the scales of the norms that both heads read through and
            write through, as they were in this forward.
        ov: `W_OV^first W_OV^second`, with the norms' gains and centring folded in.
    """

    pattern: Float[Array, "B T S"]
    weight: Float[Array, "B T S"]
    ov: Factored


def virtual_head(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    *,
    first: Head,
    second: Head,
    mask: Mask | None = None,
    check: bool = False,
) -> VirtualHead:
    """What two heads do in a row: the second reads what the first has written.

    `pattern = A_second A_first` and `ov = W_OV^first W_OV^second`. New heads do not recompile.

    Args:
        model: the transformer, of any depth.
        tokens: `[B,T]` token ids, or a captured stream with `pattern` and the norms' scales.
        first: `(layer, head)`; layers in [-L, L).
        second: `(layer, head)`, of a later layer.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        VirtualHead; its arrays are zero at padding.

    Raises:
        IndexError: if there is no such layer or head.
        ValueError: if `second` is not in a later layer; for a model with norms on the stream
            itself, or `clip_qkv`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom")
        >>> chain = virtual_head(model, tokens, first=(1, 2), second=(2, 0), mask=mask)
        >>> chain.pattern.shape, chain.ov.shape
        ((1, 4, 4), (128, 128))

    Reference:
        Elhage et al. 2021, "Virtual Attention Heads".
    """
    check_linear(model.config)
    pair = (checked_head(model, first, "first"), checked_head(model, second, "second"))
    layers = [head[0] for head in pair]
    if all(isinstance(layer, int) for layer in layers) and layers[0] >= layers[1]:
        do = "a head reads what earlier layers wrote"
        must = f"in a layer after that of `first`, {layers[0]}"
        raise ValueError(expected("second", must, f"layer {layers[1]}", do))
    return _virtual(model, source_of(model, tokens, mask, check=check, batch=True), *pair)


@compiled()
def _virtual(
    model: Transformer, source: Source, first: HeadIndex, second: HeadIndex
) -> VirtualHead:
    acc = model.config.acc
    zero_BTS = jnp.zeros((*source.shape, source.shape[-1]), acc)

    def step(state: tuple, layer: Layer) -> tuple[tuple, None]:
        stream = layer.stream
        into, out = stream.norm_attn_scale, stream.norm_attn_out_scale

        def pattern_and_weight(head: Array) -> tuple[Array, Array]:
            pattern = jnp.take(stream.pattern, head, 1).astype(acc)
            # The norm before divides what is read at S, the norm after what is written at T.
            weight = pattern if into is None else pattern / into[:, None]
            return pattern, weight if out is None else weight / out[..., None]

        def at_its_layer(wanted: HeadIndex, state: tuple) -> tuple[Array, ...]:
            pairs = zip(pattern_and_weight(wanted[1]), state, strict=True)
            return tuple(jnp.where(layer.index == wanted[0], new, old) for new, old in pairs)

        return (at_its_layer(first, state[0]), at_its_layer(second, state[1])), None

    # The layers may be traced: the state picks both patterns as they pass, no other is kept.
    start = ((zero_BTS, zero_BTS), (zero_BTS, zero_BTS))
    earlier, later = source.over_layers(model, HEAD_FIELDS, start, step)[1].state
    of = ov_of_layer(model.config, fold=True, biases=False)
    return VirtualHead(
        pattern=contract("BNT,BTS->BNS", later[0], earlier[0]),
        weight=contract("BNT,BTS->BNS", later[1], earlier[1]),
        ov=of_head(model, of, first) @ of_head(model, of, second),
    )
