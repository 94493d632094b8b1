"""Who moved the stream: the change between two of its points, split over the terms written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Mask, Tokens, checked_positions
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import norm, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.terms import TermValues
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import WHOLE, checked_by, terms_stream
from arrakis_jax.terms.decomposition import Decomposition
from arrakis_jax.terms.points import Span, StreamPoint, checked_point
from arrakis_jax.terms.stream import terms


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class MovementAttribution(TermValues):
    """How much each of C terms moves the stream from a point a to a point b, `delta = b - a`.

    Attributes:
        terms: `[C,B,T]`, `x_c . delta / |delta|^2`, shares of the movement, which sum to 1. A term
            against the movement has a negative share.
        growth: `[C,B,T]`, `x_c . (a + b)`, which sum to `|b|^2 - |a|^2`.
        distance: `[B,T]`, `|delta|`.
        gap: `[B,T]`, `|1 - sum(terms)|` over the sum of absolute terms.
        labels: the name of each term.
    """

    terms: Float[Array, "C B T"]
    growth: Float[Array, "C B T"]
    distance: Float[Array, "B T"]
    gap: Float[Array, "B T"]
    labels: Labels = field(metadata={"static": True})


def attribute_movement(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    start: int | str | tuple[str, int],
    end: int | str | tuple[str, int] = "final",
    *,
    by: str = "component",
    positions: tuple[int, ...] | None = None,
    mask: Mask | None = None,
    check: bool = False,
) -> MovementAttribution:
    """Who moved the stream from one point to another: exactly, term by term.

    The terms are the terms of `decompose` that are written between the points. They sum to the
    movement, so their shares `x_c . delta / |delta|^2` sum to 1. Their shares of the squared norm's
    growth, `x_c . (a + b)`, sum to `|b|^2 - |a|^2`. Norms on the stream itself, scales frozen, add
    a term "norm": how the norms between the points change the stream at the first point.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream with the fields of `capture_for(by)` and
            both points (resid_pre, resid_mid, final).
        start: the point a: `("resid_pre" | "resid_mid" | "resid_post", layer)`; an int n is short
            for `("resid_post", n)`.
        end: the point b, after a; "final" is the last.
        by: "component", "head", "neuron", "expert" or "source", as in `decompose`.
        positions: these positions only, counted in real tokens.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        A MovementAttribution, zero at padding.

    Raises:
        ValueError: if b is not after a, or the model lacks one of the points.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, _ = encode(tokenizer, "Alice and Tom")
        >>> found = attribute_movement(model, tokens, 0, 2, by="head")
        >>> found.terms.shape, bool(jnp.allclose(found.terms.sum(0), 1, atol=1e-5))
        ((10, 1, 4), True)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Residual stream".
    """
    config = model.config
    checked_by(config, by)
    # A later point has no count of writes that is smaller, and one that is larger.
    begin, stop = _point(start, "start", config), _point(end, "end", config)
    if begin == stop or begin.attn > stop.attn or begin.mlp > stop.mlp:
        do = "the terms are what is written from start to end"
        raise ValueError(expected("end", f"a point after start={start!r}", repr(end), do))
    source = source_of(model, tokens, mask, check=check)
    if source.captured is not None:
        source.captured.need(all_positions=by in WHOLE)
    positions = checked_positions(positions, source.shape, source.mask)
    return _split(model, source, span=Span(begin, stop), by=by, positions=positions)


def _point(point: Any, name: str, config: ModelConfig) -> StreamPoint:
    return checked_point(("resid_post", point) if isinstance(point, int) else point, config, name)


@compiled("span", "by", "positions")
def _split(
    model: Transformer,
    source: Source,
    *,
    span: Span,
    by: str,
    positions: tuple[int, ...] | None,
) -> MovementAttribution:
    config = model.config
    # Both points may be entries of one field. A dict removes repeats and keeps the order.
    fields = tuple(dict.fromkeys(point.field(config) for point in span))
    stream, ranks = terms_stream(model, source, by, positions=positions, also=fields)
    a, b = (point.of(stream, config) for point in span)
    parts = Decomposition(*terms(model, stream, ranks, span, by=by, origin=a))
    delta = b - a
    distance = norm(delta)
    # `ratio` is 0 where nothing moved, such as at padding. Shares then cannot sum to 1: no gap.
    shares = ratio(parts.along(delta), jnp.square(distance)[None])
    missing = jnp.where(distance > 0, 1 - shares.sum(0), 0)
    # |b|^2 - |a|^2 = (b - a) . (a + b), so terms that sum to b - a split the growth.
    return MovementAttribution(
        terms=shares,
        growth=parts.along(a + b),
        distance=distance,
        gap=ratio(jnp.abs(missing), jnp.abs(shares).sum(0)),
        labels=parts.labels,
    )
