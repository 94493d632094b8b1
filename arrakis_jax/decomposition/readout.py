"""What wrote a logit: every term's share, through the final norm with its scale as it was."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.axes import Array, Float
from arrakis_jax.checks import (
    Ids,
    Mask,
    Tokens,
    checked_count,
    checked_ids,
    checked_position,
    checked_tokens,
    host,
)
from arrakis_jax.decomposition.direct import checked_by, factors, located
from arrakis_jax.decomposition.terms import fields_for
from arrakis_jax.errors import NotCapturedError, expected
from arrakis_jax.forward import compiled, stream_of
from arrakis_jax.labels import Labels
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import contract, ratio
from arrakis_jax.places import Places
from arrakis_jax.residuals import Capture, ModelOutput, Record, ResidualStream


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class LogitAttribution(Record):
    """The share of each of C terms in a logit or logit difference, in logits.

    Attributes:
        terms: `[C,B]`, or `[C,B,T]` for every position.
        constant: `[B]` (`[B,T]`), what depends on no term: `beta . u + b_u`.
        logit: `[B]` (`[B,T]`), the model's logit or logit difference, read from `final`.
        gap: `[B]` (`[B,T]`), `|sum(terms) + constant - logit|` over the sum of absolute terms:
            rounding, and in an edited forward what the edits broke.
        labels: what each term is.
    """

    terms: Float[Array, "C B"]
    constant: Float[Array, " B"]
    logit: Float[Array, " B"]
    gap: Float[Array, " B"]
    labels: Labels = field(metadata={"static": True})

    def by_head(self) -> Float[Array, "L H B"]:
        """The heads' terms as `[L,H,B]` (`[L,H,B,T]`)."""
        return self.by_layer("head")

    def by_layer(self, kind: str) -> Float[Array, "L B"]:
        """The terms of one kind as `[L,B]` (attn, mlp...) or `[L,n,B]` (head, neuron, expert).

        L counts the layers that have the kind.
        """
        labels = self.labels
        labels.check(kind)
        found, offset = [], len(labels.first)
        for segment in labels.segments:
            size, columns = len(segment.layers) * segment.per_layer, segment.offsets(kind)
            if columns:
                rest = self.terms[offset : offset + size]
                rest = rest.reshape(len(segment.layers), segment.per_layer, *rest.shape[1:])
                indexed = any(k.name == kind and k.indices is not None for k in segment.kinds)
                found.append(rest[:, np.array(columns)] if indexed else rest[:, columns[0]])
            offset += size
        widths = {x.shape[1:] for x in found}
        if len(widths) > 1:
            got = f"{sorted(widths)} in different layers"
            do = "take the terms by `labels.where(kind)`"
            raise ValueError(expected("kind", "of one number of terms in every layer", got, do))
        return jnp.concatenate(found)

    def top(self, k: int) -> tuple[Array, Array]:
        """The k terms of largest absolute value: their values and indices, `[k,B]` each."""
        checked_count("k", k, len(self.labels))
        terms = jnp.moveaxis(self.terms, 0, -1)
        index = jax.lax.top_k(jnp.abs(terms), k)[1]
        value = jnp.take_along_axis(terms, index, -1)
        return jnp.moveaxis(value, -1, 0), jnp.moveaxis(index, -1, 0)


def logit_attribution(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    targets: Ids,
    *,
    against: Ids | None = None,
    by: str = "component",
    position: int | Array | None = -1,
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
        by: "component", "head", "neuron" or "expert" (kinds as in `decompose`).
        position: counted in real tokens (-1 is each row's last): an int or `[B]`. None for every
            position.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        `.terms [C,B]` and their labels; `[C,B,T]` with `position=None`, zero at padding.

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
    config = model.config
    checked_by(config, by)
    stream = stream_of(tokens, mask)
    if stream is None:
        tokens, mask = checked_tokens(config, tokens, mask, check=check)
        shape = tokens.shape
    else:
        stream.need("mask", all_layers=True)
        shape, mask = stream.mask.shape, stream.mask
    held = None if stream is None else stream.positions
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
    if stream is None:
        return _run_and_attribute(model, tokens, mask, position, targets, against, by=by)
    if position is not None and column is not None:
        return _attribute(model, stream, None, targets, against, by=by, column=column)
    return _attribute(model, stream, position, targets, against, by=by, column=None)


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


@compiled("by", "column")
def _attribute(model, stream, position, targets, against, *, by, column):
    if column is not None:
        stream, number = located(stream, (column,))
    elif position is not None:
        number = Places.of(stream.mask.shape, stream.mask).number(position[..., None])
        stream = stream.at(position[..., None])
    else:
        stream, number = located(stream, None)
    if column is None and position is None:
        return attribution(model, stream, number, targets, against, by)
    return attribution(model, stream.squeezed(), number[..., 0], targets, against, by, jnp.nan)


@compiled("by")
def _run_and_attribute(model, tokens, mask, position, targets, against, *, by):
    places = Places.of(tokens.shape, mask)
    at, number = None, places.position
    if position is not None:
        at = position[:, None]
        number = places.number(at)[:, 0]
    fields = (*fields_for(model.config, by), "final", "norm_final_scale")
    stream = model.after_embedding(
        model.embed(tokens, mask=mask), mask=mask, capture=Capture(fields), at=at
    ).residuals
    if position is None:
        return attribution(model, stream, number, targets, against, by)
    return attribution(model, stream.squeezed(), number, targets, against, by, jnp.nan)


def attribution(
    model: Transformer,
    stream: ResidualStream,
    position: Array,
    targets: Array,
    against: Array | None,
    by: str,
    absent: float = 0,
) -> LogitAttribution:
    """The uncompiled method, on a located stream: one target for each of its vectors.

    Where the mask says that there is no vector, the result is `absent`.
    """
    config = model.config
    stream.need("final", *(() if model.norm_final is None else ("norm_final_scale",)))
    parts = factors(model, stream, position, ends=(config.n_layers, config.n_layers), by=by)
    u = model.unembedding(targets)
    if against is not None:
        u = u - model.unembedding(against)
    bias = model.unembedding_bias(targets)
    if against is not None:
        bias = bias - model.unembedding_bias(against)
    r, offset = logit_direction(model, u)
    scale = jnp.ones_like(r[..., 0]) if model.norm_final is None else stream.norm_final_scale
    logit = contract("...D,...D->...", model.final_norm(stream.final), u) + bias
    terms = jnp.where(stream.mask[None], parts.along(r) / scale[None], absent)
    constant, logit = (jnp.where(stream.mask, x, absent) for x in (offset + bias, logit))
    gap = ratio(jnp.abs(terms.sum(0) + constant - logit), jnp.abs(terms).sum(0))
    return LogitAttribution(
        terms=terms, constant=constant, logit=logit, gap=gap, labels=parts.labels
    )


def logit_direction(model: Transformer, u: Float[Array, "... D"]) -> tuple[Array, Array]:
    """The stream direction `r` and the constant with `norm(x) . u = x . r / s + constant`."""
    if model.norm_final is None:
        return u, jnp.zeros(u.shape[:-1], u.dtype)
    r = model.norm_final.centre(model.norm_final.gained(u))
    if model.norm_final.b is None:
        return r, jnp.zeros(u.shape[:-1], u.dtype)
    return r, contract("...D,D->...", u, model.norm_final.b[...])
