"""Two heads in a row, taken as one."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from arrakis_jax.circuits.matrices import Factored, Head, checked_head, of_head, ov_of
from arrakis_jax.circuits.path_expansion import _FIELDS, _check_linear
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Mask, Tokens, checked_tokens
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import batch_of, over_layers, stream_of
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
        weight: `[B,T,S]`, the same with the scales of the norms on the way, as they were: those
            that both heads read through, and write through.
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
    """What a head of a later layer moves of what a head of an earlier one has moved.

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
        >>> found = virtual_head(model, tokens, first=(1, 2), second=(2, 0), mask=mask)
        >>> found.pattern.shape, found.ov.shape
        ((1, 4, 4), (128, 128))

    Reference:
        Elhage et al. 2021, "Virtual Attention Heads".
    """
    config = model.config
    _check_linear(model)
    pair = (checked_head(model, first, "first"), checked_head(model, second, "second"))
    layers = [head[0] for head in pair]
    if all(isinstance(layer, int) for layer in layers) and layers[0] >= layers[1]:
        do = "a head reads what earlier layers wrote"
        must = f"in a layer after that of `first`, {layers[0]}"
        raise ValueError(expected("second", must, f"layer {layers[1]}", do))
    stream = stream_of(tokens, mask)
    if stream is None:
        tokens, mask = checked_tokens(config, tokens, mask, check=check)
        return _virtual(model, tokens, mask, *pair)
    return _virtual(model, batch_of(stream), None, *pair)


@compiled()
def _virtual(model, source, mask, first, second):
    acc = model.config.acc
    shape = source.mask.shape if isinstance(source, ResidualStream) else source.shape
    none = jnp.zeros((*shape, shape[-1]), acc)
    none = (none, none)

    def step(state: tuple, layer: Layer) -> tuple[tuple, None]:
        stream = layer.stream
        into, out = stream.norm_attn_scale, stream.norm_attn_out_scale

        def of(head: Array) -> tuple[Array, Array]:
            pattern = jnp.take(stream.pattern, head, 1).astype(acc)
            weight = pattern if into is None else pattern / into[:, None]
            return pattern, weight if out is None else weight / out[..., None]

        def kept(wanted: tuple, held: tuple) -> tuple[Array, ...]:
            here = layer.index == wanted[0]
            pairs = zip(of(wanted[1]), held, strict=True)
            return tuple(jnp.where(here, new, old) for new, old in pairs)

        return (kept(first, state[0]), kept(second, state[1])), None

    sooner, later = over_layers(model, source, mask, _FIELDS, (none, none), step).state
    of = ov_of(model.config, fold=True, biases=False)
    return VirtualHead(
        pattern=contract("BNT,BTS->BNS", later[0], sooner[0]),
        weight=contract("BNT,BTS->BNS", later[1], sooner[1]),
        ov=of_head(model, of, *first) @ of_head(model, of, *second),
    )
