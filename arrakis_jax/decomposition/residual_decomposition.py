"""The stream after one layer, as the stream before it plus the layer's writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.checks import checked_layer
from arrakis_jax.core.errors import NotCapturedError, expected
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import stream_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import at_layer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class ResidualDecomposition(Record):
    """The parts of `resid_post[layer_idx]`. Added in this order they sum to it exactly.

    With a `stream_dtype` the sum is exact up to the rounding of the stream: see `decompose`.

    Attributes:
        from_prev: `[B,T,D]`, the stream that entered the layer: all that was written before it.
        from_attn: `[B,T,D]`, the output of its attention.
        from_mlp: `[B,T,D]`, the output of its MLP; zero in a layer without one.
        from_norm: `[B,T,D]`, the biases of norms on the stream itself; zero in pre-norm models.
    """

    from_prev: Float[Array, "B T D"]
    from_attn: Float[Array, "B T D"]
    from_mlp: Float[Array, "B T D"]
    from_norm: Float[Array, "B T D"]


def residual_decomposition(
    activations: ResidualStream | ModelOutput, layer_idx: int | Int[Array, ""]
) -> ResidualDecomposition:
    """The stream that entered a layer, and the outputs that its attention and its MLP added.

    `resid_post = resid_pre + attn_out + mlp_out`.

    Args:
        activations: a captured stream with resid_pre, attn_out and mlp_out (`run`'s default has
            them), with or without a batch axis.
        layer_idx: an int in [-L, L), or a traced scalar.

    Returns:
        A ResidualDecomposition of `[B,T,D]` arrays, zero at padding.

    Raises:
        IndexError: if there is no such layer.
        NotCapturedError: if the stream does not hold it.
        ValueError: for a model with norms on the stream itself (OPT-350m). Its parts need the
            norms' weights, which `ResidualTools(model)` has.

    Example:
        >>> model, tokenizer = demo_model()
        >>> out = run(model, encode(tokenizer, "Alice and Tom"))
        >>> parts = residual_decomposition(out, -1)
        >>> total = parts.from_prev + parts.from_attn + parts.from_mlp + parts.from_norm
        >>> bool((total == out.residuals.resid_post[-1]).all())
        True

    Reference:
        Elhage et al. 2021, "Residual stream"; `residual_decomposition` of Arrakis. This function
        corrects its identity.
    """
    stream = stream_of(activations)
    if stream is None:
        got, do = type(activations).__name__, "call run(model, tokens) first"
        must = "a ResidualStream or ModelOutput"
        raise TypeError(expected("activations", must, got, do))
    if stream.normed:
        do = "use decompose(model, ...) or ResidualTools(model), which have the norms' weights"
        got = "one with norms on the stream itself"
        raise ValueError(expected("activations", "the plain sum of what is written", got, do))
    stream.need("resid_pre", "attn_out", "mlp_out")
    row = _row(stream, layer_idx)
    return _parts(stream.resid_pre, stream.attn_out, stream.mlp_out, row)


@jax.jit
def _parts(
    resid_pre: Array, attn_out: Array, mlp_out: Array | None, row: Array
) -> ResidualDecomposition:
    # The row is traced, so that one program serves all layers.
    def at(stack: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)

    zero = jnp.zeros_like(resid_pre[0])
    return ResidualDecomposition(
        from_prev=at(resid_pre),
        from_attn=at(attn_out),
        from_mlp=zero if mlp_out is None else at(mlp_out),
        from_norm=zero,
    )


def normed_decomposition(
    model: Transformer, activations: ResidualStream | ModelOutput, layer_idx: int | Int[Array, ""]
) -> ResidualDecomposition:
    """`residual_decomposition` of a model with norms on the stream itself, scales frozen.

    Each part goes through the layer's norms as linear maps. `from_norm` is the norms' biases.
    """
    stream = stream_of(activations)
    assert stream is not None
    stream.need("resid_pre", "attn_out", "mlp_out", "norm_attn_scale", "norm_mlp_scale",
                all_layers=True)  # fmt: skip
    return _normed_parts(model, stream, _row(stream, layer_idx))


@compiled()
def _normed_parts(
    model: Transformer, stream: ResidualStream, row: Int[Array, ""]
) -> ResidualDecomposition:
    norms = at_layer(model, lambda block, _: (block.norm_attn, block.norm_mlp), row)
    x, scales = jax.tree.map(
        lambda a: jax.lax.dynamic_index_in_dim(a, row, keepdims=False),
        (
            (stream.resid_pre, stream.attn_out, stream.mlp_out),
            (stream.norm_attn_scale[..., None], stream.norm_mlp_scale[..., None]),
        ),
    )
    real = stream.mask[..., None]
    # A norm applies to all parts in the stream at that time. With `stream_before` it comes before
    # the module's output is added, so that output joins the parts after it.
    parts, before = [x[0]], model.config.norm_placement == "stream_before"
    biases = jnp.zeros_like(x[0])
    for norm, scale, written in zip(norms, scales, x[1:], strict=True):
        parts = parts if before else [*parts, written]
        parts = [norm.linear(part) / scale for part in parts]
        biases = norm.linear(biases) / scale
        if norm.b is not None:
            # Padding stays zero, so a bias counts at real tokens only.
            biases = biases + jnp.where(real, over(norm.b[...].astype(biases.dtype), biases), 0)
        parts = [*parts, written] if before else parts
    return ResidualDecomposition(
        from_prev=parts[0], from_attn=parts[1], from_mlp=parts[2], from_norm=biases
    )


def _row(stream: ResidualStream, layer_idx: Any) -> Any:
    """The index of a layer on the L axis of a stream."""
    # With only some layers captured, the index is a position in their tuple: it cannot be traced.
    if stream.layers is None:
        return checked_layer(layer_idx, stream.resid_pre.shape[0])
    return _held(stream.layers, layer_idx)


def _held(layers: tuple[int, ...], layer_idx: Any) -> int:
    if not isinstance(layer_idx, Tracer):
        if np.ndim(layer_idx) or not np.issubdtype(np.asarray(layer_idx).dtype, np.integer):
            do = "give one layer's index"
            raise TypeError(expected("layer_idx", "an integer", repr(layer_idx), do))
        if int(layer_idx) in layers:
            return layers.index(int(layer_idx))
    raise NotCapturedError(
        f"`layer_idx` must be one of the layers captured, {layers}, got {layer_idx}; count them "
        "from 0, or run the model with layers=None in its Capture"
    )
