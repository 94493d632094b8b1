"""How much each term of the stream adds to a logit, with the final norm's scale as observed."""

from __future__ import annotations

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
        constant: `[B]` (`[B,T]`), the part that no term writes: `beta . u + b_u`, with the
            biases of the final norm and of the unembedding.
        logit: `[B]` (`[B,T]`), the model's logit or logit difference, read from `final`.
        rest: `[B]` (`[B,T]`), `logit - constant - sum(terms)`. If layers or kinds were selected,
            it is the sum of all other terms. Else it is rounding, and in an edited forward the
            effect of edits that add no term.
        gap: `[B]` (`[B,T]`), `|rest|` over the sum of absolute terms; NaN if layers or kinds were
            selected, as `rest` then tests nothing.
        labels: the name of each term.
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

    `term_c = x_c . r / s` with `r = gamma * u` and the norm's gain gamma. In a LayerNorm `r` is
    centred too; terms then need not be.
    `u` is the target's unembedding, minus the unembedding of `against`. `s` is the observed scale
    of the final norm. The terms plus the constant equal the model's logit. Weights are used as
    they are. The scales of all norms are frozen, so this is an exact account of this forward. It
    does not say what removing a term would do. The logit is that before a soft-cap, after a
    factor on the logits.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream with `capture_for(by)`, which is not run
            again.
        targets: token ids, an int or `[B]`; `[B,T]` with `position=None`.
        against: token ids whose logit is subtracted, or None.
        by: "component", "head", "neuron", "expert" or "source" (kinds as in `decompose`).
        position: counted in real tokens (-1 is each row's last): an int or `[B]`. None for every
            position.
        layers: the terms of these layers (and of the embedding) only; no others are computed.
        kinds: the terms of these kinds only, such as `("head",)`.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        `.terms [C,B]` and their labels; `[C,B,T]` with `position=None`, zero at padding. Only
        these grow with the layers: heads, neurons and patterns exist for one layer at a time. See
        `top_attribution` for the largest terms alone.

    Raises:
        NotCapturedError: if a captured stream lacks a field or position.

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
    """The checked arguments of an attribution: arrays, and static values."""

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
    # A captured stream may hold some positions only: those set the shape of the targets.
    if position is None:
        shape = shape if columns is None else (*shape[:-1], len(columns))
    else:
        columns = None if columns is None else (_column(position, columns),)
        # A stream without a batch axis is checked as one row.
        rows = shape[0] if len(shape) == 2 else 1
        batch = None if source.mask is None else source.mask.reshape(rows, -1)
        position = checked_position(position, rows, batch, shape[-1])
        shape = shape[:-1]
        position = position.reshape(shape)
    targets = checked_ids(config, targets, shape, check=check)
    if against is not None:
        against = checked_ids(config, against, shape, name="against", check=check)
    return Question((source, position, targets, against), {"columns": columns, **static})


def _column(position: Any, captured: tuple[int, ...]) -> int:
    """The position asked for, which must be one of the captured positions."""
    # A captured position is found by its number, so the number must be known and the same in
    # all rows. `host` gives None for a traced one.
    values = host(position)
    chosen = set() if values is None else set(values.ravel().tolist())
    if len(chosen) != 1 or not chosen <= set(captured):
        got = "a traced one" if values is None else f"{values.tolist()}"
        raise NotCapturedError(
            f"`position` must be one of those captured, {captured}, the same in every row, got "
            f"{got}; run the model with positions=None in its Capture"
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
    # A single position is a T axis of length 1 until the result, so one code serves both.
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
    # A head's term is `Factor.along` (terms/factors.py), read as its layer ran. It stands as in the
    # stream after that layer: the norms of later layers multiply it now.
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
    # from_layer[l]: the product of the factors of layers l and later; 1 after the last layer.
    # The scan read along a direction of length 1; its size comes in here, once.
    from_layer = jax.lax.cumprod(passed, axis=0, reverse=True)
    from_layer = jnp.concatenate([from_layer, jnp.ones_like(reader.size)[None]]) * reader.size[None]
    at_the_end = []
    for terms, members in zip(layered, segment_layers(model), strict=True):
        kept = np.array([i for i in members if layers is None or i in layers], int)
        if len(kept):
            # A layer's own norms are in its terms already.
            later = from_layer[kept + 1][:, None]
            rows = kept - members[0]
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
    """The result, from each term's product with the direction."""
    read = readout.of(model, stream)
    # The final norm's scale comes in once, after all sums over D.
    terms = jnp.where(stream.mask[None], values / read.scale[None], readout.absent)
    rest = read.logit - read.constant - terms.sum(0)
    gap = ratio(jnp.abs(rest), jnp.abs(terms).sum(0)) if complete else jnp.full_like(rest, jnp.nan)
    result = LogitAttribution(
        terms=terms, constant=read.constant, logit=read.logit, rest=rest, gap=gap, labels=labels
    )
    return jax.tree.map(lambda x: x[..., 0], result) if readout.one else result
