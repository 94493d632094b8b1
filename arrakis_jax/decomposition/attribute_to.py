"""The terms that write along any direction, at any point of the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, over
from arrakis_jax.core.checks import Mask, checked_layers, checked_positions
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import at_layer
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.terms import TermValues
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import WHOLE, Kinds, checked_by, terms_stream
from arrakis_jax.terms.decomposition import Decomposition
from arrakis_jax.terms.points import Span, StreamPoint, checked_point
from arrakis_jax.terms.stream import checked_kinds, terms


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class DirectionAttribution(TermValues):
    """How much each of C terms writes along a direction.

    Attributes:
        terms: `[C,B,T]`, or `[C,B,T,N]` for N directions.
        constant: `[B,T]` (`[B,T,N]`), the part that no term writes: the norm's bias.
        value: `[B,T]` (`[B,T,N]`), the stream point along the direction, after the norm if it is
            read through one.
        rest: `[B,T]` (`[B,T,N]`), `value - constant - sum(terms)`: see LogitAttribution.
        gap: `[B,T]` (`[B,T,N]`), `|rest|` over the sum of absolute terms; NaN if layers or kinds
            were selected.
        labels: the name of each term.
    """

    terms: Float[Array, "C B T"]
    constant: Float[Array, "B T"]
    value: Float[Array, "B T"]
    rest: Float[Array, "B T"]
    gap: Float[Array, "B T"]
    labels: Labels = field(metadata={"static": True})


def attribute_to(
    model: Transformer,
    residuals: ResidualStream | ModelOutput | Any,
    direction: Float[Array, "*N D"],
    *,
    at: str | tuple[str, int] = "final",
    through: str | None = None,
    by: str = "component",
    layers: tuple[int, ...] | None = None,
    kinds: tuple[str, ...] | None = None,
    positions: tuple[int, ...] | None = None,
    mask: Mask | None = None,
    check: bool = False,
) -> DirectionAttribution:
    """Which terms of the stream at a point write along a direction.

    `term_c = x_c . u`, and the terms sum to `x . u`. Read through a norm with its scale frozen,
    `term_c = x_c . r / s` with `r = gamma * u` (centred for LayerNorm). The terms and the constant
    `beta . u` then sum to `norm(x) . u`. For a neuron's input, take its column of `w_in` at
    `("resid_mid", layer)` through "mlp". For a head's query, take a column of its `w_q` at
    `("resid_pre", layer)` through "attn". A probe of the stream needs no norm.

    Args:
        model: the transformer.
        residuals: a captured stream with the fields of `capture_for(by)`, the point itself
            (resid_pre, resid_mid, final) and the scale of the norm in `through`. Or token ids
            `[B,T]`, which are then run.
        direction: `[D]`; `[N,D]` for N directions at once; or `[B,T,D]`, one for every position.
        at: "final", or `("resid_pre" | "resid_mid" | "resid_post", layer)`.
        through: None for the stream itself, or the norm that reads it there: "attn" or "mlp" of
            the next block, or "final" at the end.
        by: "component", "head", "neuron", "expert" or "source", as in `decompose`.
        layers: the terms of these layers only.
        kinds: the terms of these kinds only, such as `("head",)`.
        positions: these positions only, counted in real tokens.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        A DirectionAttribution, zero at padding.

    Raises:
        ValueError: for a direction of another width, a point that the model does not have, or a
            norm that does not read this point.
        NotCapturedError: if a stream lacks a field that this needs.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, _ = encode(tokenizer, "Alice and Tom")
        >>> neuron = model.blocks.mlp.w_in[2, :, 7]
        >>> found = attribute_to(model, tokens, neuron, at=("resid_mid", 2), through="mlp")
        >>> found.terms.shape, bool(found.gap.max() < 1e-5)
        ((6, 1, 4), True)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Residual stream".
    """
    config = model.config
    checked_by(config, by)
    point = checked_point(at, config)
    checked_reader(model, point, through)
    source = source_of(model, residuals, mask, check=check, name="residuals")
    if source.captured is not None:
        source.captured.need(all_positions=by in WHOLE)
    positions = checked_positions(positions, source.shape, source.mask)
    read_positions = source.held if positions is None else positions
    return _attribute_to(
        model,
        source,
        _checked_direction(config, direction, source.shape, read_positions),
        positions=positions,
        point=point,
        through=through,
        by=by,
        layers=checked_layers(layers, config.n_layers),
        kinds=checked_kinds(kinds),
    )


def checked_reader(model: Transformer, point: StreamPoint, through: Any) -> None:
    """Raises ValueError unless this norm reads the stream at this point."""
    config = model.config
    name = point.field(config)
    readers = {"final": ("final",), "resid_mid": ("mlp",), "resid_pre": ("attn",)}[name]
    # In a parallel block the MLP reads the same point as attention, through its own norm.
    if name == "resid_pre" and config.parallel and not config.shared_norm:
        readers = ("attn", "mlp")
    # A norm after the sum makes the next point of the stream: nothing reads through it.
    has_norm = {"final": model.norm_final is not None}
    if config.n_layers and config.norm_placement != "stream_after":
        has_norm |= at_layer(model, _norms_of, 0)
    choices = (None, *(reader for reader in readers if has_norm.get(reader)))
    if through not in choices:
        do = "these read the stream at this point"
        raise ValueError(expected("through", f"one of {choices}", repr(through), do))


def _checked_direction(
    config: ModelConfig, direction: Any, shape: tuple[int, ...], positions: Any
) -> Array:
    # A jax.Array may be traced, and NumPy cannot convert a traced one.
    direction = direction if isinstance(direction, jax.Array) else np.asarray(direction)
    if not jnp.issubdtype(direction.dtype, jnp.floating):
        do = "convert it"
        raise TypeError(expected("direction", "real numbers", f"dtype {direction.dtype}", do))
    read_at = shape if positions is None else (*shape[:-1], len(positions))
    d = config.d_model
    right = direction.ndim in (1, 2) or direction.shape[:-1] == read_at
    if direction.ndim == 0 or direction.shape[-1] != d or not right:
        must, do = f"`[{d}]`, `[N,{d}]` or {[*read_at, d]}", "directions are of the stream"
        raise ValueError(expected("direction", must, f"shape {direction.shape}", do))
    return jnp.asarray(direction, config.acc)


def _norms_of(block: Block, _: Any) -> dict[str, bool]:
    return {"attn": block.norm_attn is not None, "mlp": block.norm_mlp is not None}


@compiled("positions", "point", "through", "by", "layers", "kinds")
def _attribute_to(
    model: Transformer,
    source: Source,
    direction: Array,
    *,
    positions: tuple[int, ...] | None,
    point: StreamPoint,
    through: str | None,
    by: str,
    layers: tuple[int, ...] | None,
    kinds: Kinds,
) -> DirectionAttribution:
    config = model.config
    scale_field = () if through is None else (f"norm_{through}_scale",)
    stream, ranks = terms_stream(
        model, source, by, kinds=kinds, positions=positions,
        also=(point.field(config), *scale_field),
    )  # fmt: skip
    x = point.of(stream, config)
    r, constant, scale = direction, jnp.zeros(direction.shape[:-1], config.acc), None
    if through is not None:
        norm, scale = _reader(model, stream, point, through)
        # The direction goes back through the norm once. No term has to go forward through it.
        r = norm.transposed(direction)
        if norm.b is not None:
            constant = contract("...D,D->...", direction, norm.b[...])
    span = Span(StreamPoint(0, 0), point)
    parts = Decomposition(*terms(model, stream, ranks, span, by=by, layers=layers, kinds=kinds))
    if direction.ndim == x.ndim and direction.ndim > 2:
        values, value = parts.along(r), contract("...D,...D->...", x, r)
    else:
        # One direction is N = 1, so that both go through `project`; the shape comes back below.
        flat = r.reshape(-1, r.shape[-1])
        shape = (*stream.mask.shape, *r.shape[:-1])
        values = parts.project(flat)
        values = values.reshape(values.shape[0], *shape)
        value = contract("...D,ND->...N", x, flat).reshape(shape)
        constant = over(constant, value) if constant.ndim else constant
    # The scale divides the results rather than the terms: there are far fewer numbers.
    if scale is not None:
        scale = scale.reshape(*scale.shape, *(1,) * (value.ndim - scale.ndim))
        values, value = values / scale[None], value / scale
    real = stream.mask.reshape(*stream.mask.shape, *(1,) * (value.ndim - stream.mask.ndim))
    constant = jnp.broadcast_to(jnp.where(real, constant, 0), value.shape)
    value = value + constant
    rest = value - constant - values.sum(0)
    complete = layers is None and kinds is None
    gap = ratio(jnp.abs(rest), jnp.abs(values).sum(0))
    return DirectionAttribution(
        terms=values,
        constant=constant,
        value=value,
        rest=rest,
        gap=gap if complete else jnp.full_like(gap, jnp.nan),
        labels=parts.labels,
    )


def _reader(
    model: Transformer, stream: ResidualStream, point: StreamPoint, through: str
) -> tuple[Norm, Float[Array, "B T"]]:
    """The norm that reads the stream at a point, and its scale there."""
    if through == "final":
        assert model.norm_final is not None
        return model.norm_final, stream.norm_final_scale
    norm = at_layer(model, lambda block, _: getattr(block, f"norm_{through}"), point.mlp)
    return norm, stream.of_layer(f"norm_{through}_scale", point.mlp)
