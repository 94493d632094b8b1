"""What wrote a logit: every term's share, through the final norm with its scale as it was."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import (
    Ids,
    Mask,
    Tokens,
    checked_ids,
    checked_layers,
    checked_position,
    checked_tokens,
    host,
)
from arrakis_jax.core.errors import NotCapturedError
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import stream_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.terms import TermValues
from arrakis_jax.stream.capture import Capture
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import WHOLE, Kinds, checked_by, fields_for
from arrakis_jax.terms.decomposition import Decomposition, assembled
from arrakis_jax.terms.points import located
from arrakis_jax.terms.scan import Readout, in_scan, labels_in_scan, outside_of, readout_of
from arrakis_jax.terms.stream import Span, checked_kinds, embeddings, terms


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class LogitAttribution(TermValues):
    """The share of each of C terms in a logit or logit difference, in logits.

    Attributes:
        terms: `[C,B]`, or `[C,B,T]` for every position.
        constant: `[B]` (`[B,T]`), what depends on no term: `beta . u + b_u`.
        logit: `[B]` (`[B,T]`), the model's logit or logit difference, read from `final`.
        rest: `[B]` (`[B,T]`), `logit - constant - sum(terms)`: what terms that are not listed
            wrote, where layers or kinds were selected; else rounding, and in an edited forward what
            the edits broke.
        gap: `[B]` (`[B,T]`), `|rest|` over the sum of absolute terms; NaN where terms are not
            listed, and there is nothing to check.
        labels: what each term is.
    """

    terms: Float[Array, "C B"]
    constant: Float[Array, " B"]
    logit: Float[Array, " B"]
    rest: Float[Array, " B"]
    gap: Float[Array, " B"]
    labels: Labels = field(metadata={"static": True})


def logit_attribution(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    targets: Ids,
    *,
    against: Ids | None = None,
    by: str = "component",
    position: int | Array | None = -1,
    layers: tuple[int, ...] | None = None,
    kinds: tuple[str, ...] | None = None,
    mask: Mask | None = None,
    check: bool = False,
) -> LogitAttribution:
    """Direct logit attribution: which terms of the stream write a logit or logit difference.

    `term_c = x_c . r / s` with `r = gamma * u` (LayerNorm: centred, so that terms need not be),
    `u` the target's unembedding (minus that of `against`) and `s` the observed scale of the
    final norm. The terms plus the constant equal the model's logit. Weights are used as they are.
    The norm's scale is frozen, as are those of norms that a term is written through: this is an
    exact account of this forward, not of what removing a term would do. Factors on the logits are
    included; a soft-cap is not: the logit is that before it.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a stream already captured (with `capture_for(by)`), of
            which nothing is run again.
        targets: token ids, an int or `[B]`; `[B,T]` with `position=None`.
        against: token ids whose logit is subtracted, or None.
        by: "component", "head", "neuron", "expert" or "source" (kinds as in `decompose`).
        position: counted in real tokens (-1 is each row's last): an int or `[B]`. None for every
            position.
        layers: the terms of these layers only (and of the embedding): no others are computed.
        kinds: the terms of these kinds only, such as `("head",)`.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        `.terms [C,B]` and their labels; `[C,B,T]` with `position=None`, zero at padding. In memory
        that is all: heads, neurons and patterns exist for one layer at a time. For the largest
        terms alone see `top_attribution`.

    Raises:
        NotCapturedError: if a stream is given that lacks a field or position.

    Example:
        >>> model, tokenizer = demo_model()
        >>> prompts = ["Alice and Tom met, Tom gave a book to", "Lucy and Mark"]
        >>> tokens, mask = encode(tokenizer, prompts)
        >>> alice = token_id(tokenizer, " Alice")
        >>> found = logit_attribution(model, tokens, alice, by="head", mask=mask)
        >>> found.terms.shape, found.by_head().shape, bool(found.gap.max() < 1e-5)
        ((21, 2), (4, 4, 2), True)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    ask = asked(model, tokens, targets, against=against, by=by, position=position, layers=layers,
                kinds=kinds, mask=mask, check=check)  # fmt: skip
    about = (ask.position, ask.targets, ask.against)
    if ask.stream is None:
        return _run_and_attribute(model, ask.tokens, ask.mask, *about, **ask.options)
    return _attribute(model, ask.stream, *about, column=ask.column, **ask.options)


class Asked(NamedTuple):
    """The checked arguments of an attribution: a stream, or what to run; and what is static."""

    stream: ResidualStream | None
    tokens: Array
    mask: Array | None
    position: Array | None
    targets: Array
    against: Array | None
    column: int | None
    options: dict[str, Any]


def asked(
    model: Transformer,
    tokens: Any,
    targets: Any,
    *,
    against: Any,
    by: Any,
    position: Any,
    layers: Any,
    kinds: Any,
    mask: Any,
    check: bool,
) -> Asked:
    """The arguments of `logit_attribution`, checked."""
    config = model.config
    checked_by(config, by)
    options = {
        "by": by,
        "layers": checked_layers(layers, config.n_layers),
        "kinds": checked_kinds(kinds),
    }
    stream = stream_of(tokens, mask)
    if stream is None:
        tokens, mask = checked_tokens(config, tokens, mask, check=check)
        shape = tokens.shape
    else:
        stream.need("mask", all_layers=layers is None, all_positions=by in WHOLE)
        shape, mask = stream.mask.shape, stream.mask
    held, column = None if stream is None else stream.positions, None
    if position is None:
        shape = shape if held is None else (*shape[:-1], len(held))
    else:
        given = position
        rows = (shape[0], mask) if len(shape) == 2 else (1, None if mask is None else mask[None])
        position = checked_position(given, *rows, shape[-1])
        shape = shape[:-1]
        position = position.reshape(shape)
        column = None if held is None else _column(given, held)
    targets = checked_ids(config, targets, shape, check=check)
    if against is not None:
        against = checked_ids(config, against, shape, name="against", check=check)
    return Asked(stream, tokens, mask, position, targets, against, column, options)


def _column(position: Any, held: tuple[int, ...]) -> int:
    """The one position asked for, as one of those that a stream holds."""
    values = host(position)
    chosen = set() if values is None else set(values.ravel().tolist())
    if len(chosen) != 1 or not chosen <= set(held):
        got = "a traced one" if values is None else f"{values.tolist()}"
        raise NotCapturedError(
            f"`position` must be one of those captured, {held}, the same in every row, got {got}; "
            "run the model with positions=None in its Capture"
        )
    return chosen.pop()


@compiled("by", "layers", "kinds", "column")
def _attribute(model, stream, position, targets, against, *, by, layers, kinds, column):
    one = position is not None
    if column is not None:
        stream, number = located(stream, (column,), by)
    elif one:
        number = Padding.of(stream.mask.shape, stream.mask).counted(position[..., None])
        stream = stream.at(position[..., None], whole=WHOLE.get(by, ()))
    else:
        stream, number = located(stream, None, by)
    reading = readout_of(model, targets, against, one)
    return stacked(model, stream, number, reading, by=by, layers=layers, kinds=kinds)


@compiled("by", "layers", "kinds")
def _run_and_attribute(model, tokens, mask, position, targets, against, *, by, layers, kinds):
    padding = Padding.of(tokens.shape, mask)
    at = None if position is None else position[:, None]
    number = padding.rank if at is None else padding.counted(at)
    reading = readout_of(model, targets, against, position is not None)
    if layers is None and not model.config.norms_stream:
        passed = in_scan(model, tokens, mask, at, reading.direction, by=by, kinds=kinds,
                         state=None, step=lambda state, layer, found: (state, found))  # fmt: skip
        stream = outside_of(passed, padding, at)
        names, first = embeddings(model, stream, number, kinds)
        labels = labels_in_scan(model, names, passed.found, kinds)
        first = contract("C...D,...D->C...", first, reading.direction)
        values = assembled(first, passed.found, labels)
        return attribution(model, stream, reading, values, labels, kinds is None)
    fields = (*fields_for(model.config, by, kinds), "final", "norm_final_scale")
    every = model.config.stream_dtype is not None or model.config.norms_stream
    stream = model.after_embedding(
        model.embed(tokens, mask=mask),
        mask=mask,
        capture=Capture(fields, layers=None if every else layers),
        at=at,
        whole=WHOLE.get(by, ()),
    ).residuals
    return stacked(model, stream, number, reading, by=by, layers=layers, kinds=kinds)


def stacked(
    model: Transformer,
    stream: ResidualStream,
    number: Array,
    reading: Readout,
    *,
    by: str,
    layers: tuple[int, ...] | None,
    kinds: Kinds,
) -> LogitAttribution:
    """The attribution of a located stream, which holds what its terms are made of."""
    n = model.config.n_layers
    stream.need("final", *(() if model.norm_final is None else ("norm_final_scale",)))
    found = terms(model, stream, number, Span((n, n)), by=by, layers=layers, kinds=kinds)
    values = Decomposition(*found).along(reading.direction)
    complete = layers is None and kinds is None
    return attribution(model, stream, reading, values, found.labels, complete)


def attribution(
    model: Transformer,
    stream: ResidualStream,
    reading: Readout,
    values: Float[Array, "C B T"],
    labels: Labels,
    complete: bool,
) -> LogitAttribution:
    """The result, from each term's product with the direction; NaN where there is no position."""
    read = reading.of(model, stream)
    terms = jnp.where(stream.mask[None], values / read.scale[None], reading.absent)
    rest = read.logit - read.constant - terms.sum(0)
    gap = ratio(jnp.abs(rest), jnp.abs(terms).sum(0)) if complete else jnp.full_like(rest, jnp.nan)
    result = LogitAttribution(
        terms=terms, constant=read.constant, logit=read.logit, rest=rest, gap=gap, labels=labels
    )
    return jax.tree.map(lambda x: x[..., 0], result) if reading.one else result
