"""What writes along any direction, at any point of the stream."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, over
from arrakis_jax.core.checks import Mask, checked_layers, checked_positions, checked_tokens
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import stream_of
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.terms import TermValues
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import WHOLE, captured, checked_by
from arrakis_jax.terms.decomposition import Decomposition
from arrakis_jax.terms.points import checked_point, located
from arrakis_jax.terms.stream import Span, checked_kinds, terms


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class DirectionAttribution(TermValues):
    """How much each of C terms writes along a direction.

    Attributes:
        terms: `[C,B,T]`, or `[C,B,T,N]` for N directions.
        constant: `[B,T]` (`[B,T,N]`), what depends on no term: the norm's bias.
        value: `[B,T]` (`[B,T,N]`), the stream point (or what its norm makes of it) along the
            direction.
        rest: `[B,T]` (`[B,T,N]`), `value - constant - sum(terms)`: see LogitAttribution.
        gap: `[B,T]` (`[B,T,N]`), `|rest|` over the sum of absolute terms; NaN where layers or
            kinds were selected.
        labels: what each term is.
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

    `term_c = x_c . u`; the terms sum to `x . u`. Read through the norm of a reader, its scale as
    it was, `term_c = x_c . r / s` with `r = gamma * u` (centred for LayerNorm), and the terms and
    the constant `beta . u` sum to `norm(x) . u`. So what a neuron reads is explained by its column
    of `w_in` at `("resid_mid", layer)` through "mlp", a head's query by a column of its `w_q` at
    `("resid_pre", layer)` through "attn", and a probe of the stream through nothing.

    Args:
        model: the transformer.
        residuals: a captured stream, with the fields of `capture_for(by)`, the point itself
            (resid_pre, resid_mid, final) and, read through a norm, its scale; or token ids
            `[B,T]`, which are then run.
        direction: `[D]`; `[N,D]` for N directions at once; or `[B,T,D]`, one for every position.
        at: "final", or `("resid_pre" | "resid_mid" | "resid_post", layer)`.
        through: None for the stream itself; or the norm by which it is read there: "attn" or "mlp"
            of the block that follows, or "final" at the end.
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
            norm that does not read it.
        NotCapturedError: if a stream lacks what this needs.

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
    ends = checked_point(at, config)
    point = point_of(ends, config)
    checked_reader(model, point, through)
    options = {
        "at": at if at == "final" else tuple(at),
        "through": through,
        "by": by,
        "layers": checked_layers(layers, config.n_layers),
        "kinds": checked_kinds(kinds),
    }
    stream = stream_of(residuals, mask)
    if stream is None:
        tokens, mask = checked_tokens(config, residuals, mask, check=check, name="residuals")
        positions = checked_positions(positions, tokens.shape, mask)
        direction = _checked_direction(config, direction, tokens.shape, positions)
        return _run_and_attribute_to(model, tokens, mask, direction, positions=positions, **options)
    stream.need("mask", all_positions=by in WHOLE)
    positions = checked_positions(positions, stream.mask.shape, stream.mask)
    held = stream.positions if positions is None else positions
    direction = _checked_direction(config, direction, stream.mask.shape, held)
    return _attribute_to(model, stream, direction, positions=positions, **options)


Point = tuple[str, int]


def point_of(ends: tuple[int, int], config: ModelConfig) -> Point:
    """The field that holds the point after these many attentions and MLPs, and its layer."""
    attn, mlp = ends
    if attn != mlp:
        return "resid_mid", mlp
    return ("final", -1) if mlp == config.n_layers else ("resid_pre", mlp)


def point_in(stream: ResidualStream, point: Point) -> Float[Array, "B T D"]:
    """The stream at a point."""
    name, layer = point
    if name == "final":
        return stream.final
    return of_layer(stream, name, layer)


def of_layer(stream: ResidualStream, name: str, layer: int) -> Array:
    """A field of one layer, counted from 0."""
    if stream.layers is not None and layer not in stream.layers:
        stream.need(all_layers=True)
    row = layer if stream.layers is None else stream.layers.index(layer)
    return getattr(stream, name)[row]


def checked_reader(model: Transformer, point: Point, through: Any) -> None:
    """Raises ValueError unless this norm reads the stream at this point."""
    config = model.config
    name, _ = point
    readers = {"final": ("final",), "resid_mid": ("mlp",), "resid_pre": ("attn",)}[name]
    if name == "resid_pre" and config.parallel and not config.shared_norm:
        readers = ("attn", "mlp")
    block = model.stacks()[0][0] if config.n_layers else None
    norms = {"final": model.norm_final}
    if block is not None and config.norm_placement != "stream_after":
        norms |= {"attn": block.norm_attn, "mlp": block.norm_mlp}
    choices = (None, *(reader for reader in readers if norms.get(reader) is not None))
    if through not in choices:
        do = "these read the stream at this point"
        raise ValueError(expected("through", f"one of {choices}", repr(through), do))


def _checked_direction(
    config: ModelConfig, direction: Any, shape: tuple[int, ...], positions: Any
) -> Array:
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


@compiled("positions", "at", "through", "by", "layers", "kinds")
def _run_and_attribute_to(
    model, tokens, mask, direction, *, positions, at, through, by, layers, kinds
):
    name, _ = point_of(checked_point(at, model.config), model.config)
    scale = () if through is None else (f"norm_{through}_scale",)
    stream = captured(model, tokens, mask, by, kinds=kinds, positions=positions,
                      also=(name, *scale))  # fmt: skip
    return _along(model, stream, direction, positions, at, through, by, layers, kinds)


@compiled("positions", "at", "through", "by", "layers", "kinds")
def _attribute_to(model, stream, direction, *, positions, at, through, by, layers, kinds):
    return _along(model, stream, direction, positions, at, through, by, layers, kinds)


def _along(model, stream, direction, positions, at, through, by, layers, kinds):
    config = model.config
    ends = checked_point(at, config)
    point = point_of(ends, config)
    stream.need(point[0], *(() if through is None else (f"norm_{through}_scale",)))
    stream, number = located(stream, positions, by)
    x = point_in(stream, point).astype(config.acc)
    r, constant, scale = direction, jnp.zeros(direction.shape[:-1], config.acc), None
    if through is not None:
        norm, scale = _reader(model, stream, point, through)
        r = norm.centre(norm.gained(direction))
        if norm.b is not None:
            constant = contract("...D,D->...", direction, norm.b[...])
    found = terms(model, stream, number, Span(ends), by=by, layers=layers, kinds=kinds)
    parts = Decomposition(*found)
    if direction.ndim == x.ndim and direction.ndim > 2:
        values, value = parts.along(r), contract("...D,...D->...", x, r)
    else:
        flat = r.reshape(-1, r.shape[-1])
        shape = (*stream.mask.shape, *r.shape[:-1])
        values = parts.project(flat)
        values = values.reshape(values.shape[0], *shape)
        value = contract("...D,ND->...N", x, flat).reshape(shape)
        constant = over(constant, value) if constant.ndim else constant
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
    model: Transformer, stream: ResidualStream, point: Point, through: str
) -> tuple[Norm, Float[Array, "B T"]]:
    """A norm that reads the stream at a point, without a layer axis, and its scale there."""
    if through == "final":
        assert model.norm_final is not None
        return model.norm_final, stream.norm_final_scale
    layer = point[1]
    for block, layers in model.stacks():
        if layer in layers:
            norms = getattr(block, f"norm_{through}")
            norm = jax.tree.map(lambda w, i=layer - layers.start: w[i], norms)
            return norm, of_layer(stream, f"norm_{through}_scale", layer)
    raise AssertionError(f"no segment holds layer {layer}")
