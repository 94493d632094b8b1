"""What wrote a logit: every term's share, through the final norm with its scale as it was."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import (
    Ids,
    Mask,
    Tokens,
    checked_ids,
    checked_layers,
    checked_position,
    host,
)
from arrakis_jax.core.errors import NotCapturedError
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.frozen.reads import StreamReader
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import segment_layers
from arrakis_jax.results.labels import Labels
from arrakis_jax.results.terms import TermValues
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import WHOLE, Kinds, checked_by
from arrakis_jax.terms.decomposition import assembled
from arrakis_jax.terms.factors import Measured
from arrakis_jax.terms.scan import LayerValues, Readout, labels_of, over_terms, readout_of
from arrakis_jax.terms.stream import checked_kinds, embeddings


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
    question = asked(model, tokens, targets, against=against, by=by, position=position,
                     layers=layers, kinds=kinds, mask=mask, check=check)  # fmt: skip
    return _attribute(model, *question.arrays, **question.static)


class Question(NamedTuple):
    """The checked arguments of an attribution: arrays, and what is static."""

    arrays: tuple[Source, Array | None, Array, Array | None]
    static: dict[str, Any]


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
) -> Question:
    """The arguments of `logit_attribution`, checked."""
    config = model.config
    checked_by(config, by)
    static: dict[str, Any] = {
        "by": by,
        "layers": checked_layers(layers, config.n_layers),
        "kinds": checked_kinds(kinds),
    }
    source = source_of(model, tokens, mask, check=check)
    if source.captured is not None:
        source.captured.need(all_layers=layers is None, all_positions=by in WHOLE)
    shape, columns = source.shape, source.held
    if position is None:
        shape = shape if columns is None else (*shape[:-1], len(columns))
    else:
        columns = None if columns is None else (_column(position, columns),)
        rows = shape[0] if len(shape) == 2 else 1
        batch = None if source.mask is None else source.mask.reshape(rows, -1)
        position = checked_position(position, rows, batch, shape[-1])
        shape = shape[:-1]
        position = position.reshape(shape)
    targets = checked_ids(config, targets, shape, check=check)
    if against is not None:
        against = checked_ids(config, against, shape, name="against", check=check)
    return Question((source, position, targets, against), {"columns": columns, **static})


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


@compiled("columns", "by", "layers", "kinds")
def _attribute(
    model: Transformer,
    source: Source,
    position: Array | None,
    targets: Array,
    against: Array | None,
    *,
    columns: tuple[int, ...] | None,
    by: str,
    layers: tuple[int, ...] | None,
    kinds: Kinds,
) -> LogitAttribution:
    at = columns if columns is not None or position is None else position[..., None]
    readout = readout_of(model, targets, against, position is not None)
    readout.check(model, source)
    reader = StreamReader.of(model, readout.direction)

    def keep(_: None, layer: LayerValues) -> tuple[None, tuple]:
        return None, (layer.terms, layer.passed)

    stream, walked = over_terms(model, source, reader, None, keep, by=by, kinds=kinds,
                                layers=layers, at=at)  # fmt: skip
    names, first = embeddings(model, stream, source.ranks(at), kinds)
    first = contract("C...D,...D->C...", first, reader.first)
    layered = [terms for terms, _ in walked.by_segment]
    labels = labels_of(model, names, layered, kinds, layers)
    if model.config.norms_stream:
        passed = jnp.concatenate([factor for _, factor in walked.by_segment])
        first, layered = _at_the_end(model, reader, first, layered, passed, layers)
    values = assembled(first, layered, labels)
    return _result(model, stream, readout, values, labels, layers is None and kinds is None)


def _at_the_end(
    model: Transformer,
    reader: StreamReader,
    first: Array,
    layered: list[tuple[Measured, ...]],
    passed: Float[Array, "L B T"],
    layers: tuple[int, ...] | None,
) -> tuple[Array, list[tuple[Measured, ...]]]:
    """The terms of these layers, times the factors of all later norms on the stream."""
    # from_layer[l]: the product of the factors of layers l and later; one after the last.
    from_layer = jax.lax.cumprod(passed, axis=0, reverse=True)
    from_layer = jnp.concatenate([from_layer, jnp.ones_like(passed[:1])]) * reader.size[None]
    at_the_end = []
    for terms, own in zip(layered, segment_layers(model), strict=True):
        kept = np.array([i for i in own if layers is None or i in layers], int)
        if len(kept):
            later = from_layer[kept + 1][:, None]
            rows = kept - own[0]
            at_the_end.append(tuple(Measured(t.value[rows] * later, t.kind) for t in terms))
    return first * from_layer[:1], at_the_end


def _result(
    model: Transformer,
    stream: ResidualStream,
    readout: Readout,
    values: Float[Array, "C B T"],
    labels: Labels,
    complete: bool,
) -> LogitAttribution:
    """The result, from each term's product with the direction; NaN where there is no position."""
    read = readout.of(model, stream)
    terms = jnp.where(stream.mask[None], values / read.scale[None], readout.absent)
    rest = read.logit - read.constant - terms.sum(0)
    gap = ratio(jnp.abs(rest), jnp.abs(terms).sum(0)) if complete else jnp.full_like(rest, jnp.nan)
    result = LogitAttribution(
        terms=terms, constant=read.constant, logit=read.logit, rest=rest, gap=gap, labels=labels
    )
    return jax.tree.map(lambda x: x[..., 0], result) if readout.one else result
