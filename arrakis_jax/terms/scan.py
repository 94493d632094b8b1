"""Reading terms along a direction, inside the scan over layers or after it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.source import Passed, over_layers
from arrakis_jax.frozen.reads import logit_direction, logit_reader
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.results.labels import Labels, Segment
from arrakis_jax.stream.fields import UNSTACKED
from arrakis_jax.stream.padding import Padding, select_positions
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.capture import WHOLE, Kinds, fields_for
from arrakis_jax.terms.factors import Measured, measured
from arrakis_jax.terms.layer import LayerTerms
from arrakis_jax.terms.stream import check_found


class Read(NamedTuple):
    """What a readout finds at a stream's end: the logit, its constant, and the norm's scale."""

    logit: Float[Array, "B T"]
    constant: Float[Array, "B T"]
    scale: Float[Array, "B T"]


class Readout(NamedTuple):
    """A logit, or a difference of two, as a direction of the stream before the final norm.

    Attributes:
        u: `[B,T,D]`, what reads the logit from the normed stream.
        direction: `[B,T,D]`: `norm(x) . u = x . direction / scale + offset`.
        offset: `[B,T]`.
        bias: `[B,T]`, the unembedding's.
        one: whether T is one position of each row, asked for by its number.
    """

    u: Array
    direction: Array
    offset: Array
    bias: Array
    one: bool

    @property
    def absent(self) -> float:
        """What stands where a row has no such position: NaN if it was asked for, 0 at padding."""
        return float("nan") if self.one else 0.0

    def of(self, model: Transformer, stream: ResidualStream) -> Read:
        """The logit of a located stream, as the model computes it, before a soft-cap."""
        scale = jnp.ones_like(self.offset) if model.norm_final is None else stream.norm_final_scale
        logit = contract("...D,...D->...", model.final_norm(stream.final), self.u) + self.bias
        logit, constant = (
            jnp.where(stream.mask, x, self.absent) for x in (logit, self.offset + self.bias)
        )
        return Read(logit, constant, scale)


def readout_of(model: Transformer, targets: Array, against: Array | None, one: bool) -> Readout:
    """The readout of these targets, `[B]` if of one position each, else `[B,T]`."""
    if one:
        targets, against = targets[..., None], None if against is None else against[..., None]
    u, bias = logit_reader(model, targets, against)
    return Readout(u, *logit_direction(model, u), bias, one)


def in_scan(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    at: Int[Array, "B N"] | None,
    direction: Float[Array, "B T D"],
    *,
    by: str,
    kinds: Kinds,
    state: Any,
    step: Callable[[Any, Layer, tuple[Measured, ...]], tuple[Any, Any]],
) -> Passed:
    """Runs the model and hands each layer's terms along a direction to a function, in the scan.

    Not for models with norms on the stream, whose terms depend on later layers.
    """
    config = model.config
    fields = tuple(f for f in fields_for(config, by, kinds) if f not in UNSTACKED)
    index, valid = (None, None) if at is None else Padding.of(tokens.shape, mask).columns(at)

    def stepping(state: Any, layer: Layer) -> tuple[Any, Any]:
        stream, post = layer.stream, layer.resid_post
        if index is not None and valid is not None:
            stream = stream.picked(index, valid, whole=WHOLE.get(by, ()), stacked=False)
            post = select_positions(post, index, valid, 1)
        part = LayerTerms(config, layer._replace(stream=stream, resid_post=post))
        found = measured(part.terms(by, kinds), lambda factor: factor.along(direction))
        return step(state, layer, found)

    return over_layers(model, tokens, mask, fields, state, stepping)


def outside_of(passed: Passed, padding: Padding, at: Array | None) -> ResidualStream:
    """The stream outside of the layers, at the positions asked for."""
    return passed.stream if at is None else passed.stream.picked(*padding.columns(at))


def labels_in_scan(
    model: Transformer, names: tuple[str, ...], found: list[tuple[Measured, ...]], kinds: Kinds
) -> Labels:
    """The labels of terms that were found in the scan, of all layers."""
    segments = tuple(
        Segment(tuple(layers), tuple(each.kind for each in own))
        for own, (_, layers) in zip(found, model.stacks(), strict=True)
    )
    labels = Labels(names, segments)
    check_found(kinds, labels)
    return labels
