"""The fields that a forward must record so that terms can be made of them."""

from __future__ import annotations

from typing import Any

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.core.checks import checked_choice
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.source import Source
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.layer import (
    ATTENTION_FACTORS,
    ATTENTION_KINDS,
    BY,
    MLP_FACTORS,
    MLP_KINDS,
    wants,
)

# Terms by source need the values of every position, because any position can be a source.
WHOLE = {"source": ("v",)}
STREAM_NORMS = ("norm_attn_scale", "norm_mlp_scale")
Kinds = tuple[str, ...] | None


def capture_for(by: str) -> tuple[str, ...]:
    """The fields that `run` must capture for `decompose` and `logit_attribution`."""
    checked_choice("by", by, BY)
    fields = (
        "embed",
        *ATTENTION_FACTORS[by],
        *MLP_FACTORS[by],
        *STREAM_NORMS,
        "final",
        "norm_final_scale",
    )
    return tuple(dict.fromkeys(fields))


def checked_by(config: ModelConfig, by: Any) -> None:
    """Raises ValueError unless a model of this config can be decomposed `by` this."""
    checked_choice("by", by, BY)
    if by == "expert" and not config.n_experts:
        must = f"one of {tuple(b for b in BY if b != 'expert')} in a model without experts"
        raise ValueError(expected("by", must, repr(by), "choose one"))


def terms_stream(
    model: Transformer,
    source: Source,
    by: str,
    *,
    kinds: Kinds = None,
    layers: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None,
    also: tuple[str, ...] = (),
) -> tuple[ResidualStream, Int[Array, "B T"]]:
    """The stream with the fields for terms at these layers and positions, and the positions' ranks.

    Terms by source keep values at all positions. Of a captured stream only the fields `also` are
    checked here: `terms` checks the rest.
    """
    config = model.config
    # A rounding is the difference between neighbouring layers. A norm on the stream changes the
    # terms of all earlier layers. Both need every layer, whichever layers are asked for.
    every = config.stream_dtype is not None or config.norms_stream
    fields = also if source.captured is not None else (*fields_for(config, by, kinds), *also)
    at = source.held if positions is None else positions
    stream = source.stream(
        model, fields, layers=None if every or not layers else layers, at=at,
        whole=WHOLE.get(by, ()),
    )  # fmt: skip
    return stream, source.ranks(at)


def fields_for(config: ModelConfig, by: str, kinds: Kinds = None) -> tuple[str, ...]:
    """The fields that the terms of this model need."""
    # A rounding is a point of the stream, minus the point before it and the write between them.
    rounded = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "final")
    names = (
        "embed",
        *(ATTENTION_FACTORS[by] if wants(kinds, ATTENTION_KINDS) else ()),
        *(MLP_FACTORS[by] if wants(kinds, MLP_KINDS) else ()),
        *(rounded if config.stream_dtype else ()),
        *(STREAM_NORMS if config.norms_stream else ()),
    )
    # A dict removes repeats and keeps the order, which a set would not: the fields are static.
    return tuple(dict.fromkeys(names))
