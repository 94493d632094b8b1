"""How much each source token brings to each position, layer by layer and from the input on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_choice, checked_ids
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.frozen.attention import BROUGHT_FIELDS, attention_brought
from arrakis_jax.movement.alti_logit import logit_flow
from arrakis_jax.movement.contributions import alti, brought_norms, identity, mixing, normalised
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

TO_LOGITS = ("alti_logit", "alti_logit_complete")
FLOW_METHODS = ("attention", "value_weighted", "mixing", "rollout", "alti", *TO_LOGITS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class InformationFlow(Record):
    """What source tokens S contribute to destinations T; zero at padding.

    Attributes:
        tokens: `[B,T,S]`, from the input through all layers. Rows sum to 1, or for logits are in
            logits.
        empty: `[B,T]`, real positions to which nothing contributed in some layer (0 by 0 is 0).
        layers: `[L,B,T,S]`, of each layer alone: rows that sum to 1, or the logits that positions
            of that layer bring through attention. Only if asked for.
        total: `[L,B,T]`, the sum of each row before it was normalised: `layers * total` are the
            norms themselves. Only with `layers`, and not for logits.
        mixing_ratio: `[L,B,T]`, for "mixing": the norm of all that other positions bring over that
            plus the norm of what a position keeps.
        constant: `[B,T]`, for "alti_logit_complete": the part of the logit that no token brings.
    """

    tokens: Float[Array, "B T S"]
    empty: Bool[Array, "B T"]
    layers: Float[Array, "L B T S"] = ABSENT
    total: Float[Array, "L B T"] = ABSENT
    mixing_ratio: Float[Array, "L B T"] = ABSENT
    constant: Float[Array, "B T"] = ABSENT


def information_flow(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    targets: Ids | None = None,
    *,
    method: str = "alti",
    against: Ids | None = None,
    layers: bool = False,
    mask: Mask | None = None,
    check: bool = False,
) -> InformationFlow:
    """How much each token of the input contributes to each position, or to a logit there.

    A layer's contributions `c_ij` of position j to i, rows divided by their sums, are propagated
    to the input: `R_l = C_l R_{l-1}`. With `f_ij = sum_h A^h_ij v^h_j W_O^h` as it is written to
    the stream (through norms of the output and of the stream, scales as they were), and `y_i` the
    stream after attention, biases included:

    - "attention": the mean of `A` over heads.
    - "rollout": that plus the identity.
    - "value_weighted": `|f_ij|`.
    - "mixing": `|f_ij + [i=j] x_i|`, with the stream `x_i` that attention adds to.
    - "alti": `max(0, |y_i|_1 - |y_i - f_ij - [i=j] x_i|_1)`.
    - "alti_logit": the logits `q^l_ij` that attention brings from j to i in layer l, attributed
      through the layers before by "alti": `sum_l q^l C_{l-1} ... C_1`, as published. It leaves out
      what the embedding and MLPs write, so that it does not sum to the logit.
    - "alti_logit_complete": ours. The embedding's logits belong to i itself. The logits of an MLP,
      its biases included, are attributed as the stream that it reads. `tokens.sum(-1) + constant`
      is the logit (before a soft-cap).

    Rows are renormalised where attention has sinks. The MLP is taken to keep the mixture as it is,
    except for its logits. Each position has a target of its own; norms that its logit passes
    through are frozen.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a stream captured with "all", then not run again.
        targets: for logits: token ids, an int, `[B]`, or `[B,T]`.
        method: one of those above.
        against: token ids whose logit is subtracted, or None.
        layers: also return each layer's own contributions, `[L,B,T,S]`.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        `.tokens [B,T,S]`, and what InformationFlow says.

    Raises:
        ValueError: for another method, or targets with a method that has none, or none where it
            needs them.
        NotCapturedError: if a stream is given that lacks a field.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> flow = information_flow(model, tokens, mask=mask)
        >>> flow.tokens.shape, bool(jnp.allclose(flow.tokens.sum(-1)[mask == 1], 1))
        ((2, 4, 4), True)

    Reference:
        Abnar & Zuidema 2020 (rollout); Kobayashi et al. 2020, section 2 (value_weighted), and
        2021, section 3 (mixing); Ferrando et al. 2022, section 3 (alti), and 2023 (alti_logit).
    """
    checked_choice("method", method, FLOW_METHODS)
    if not isinstance(layers, bool | np.bool_):
        do = "only that decides what is returned"
        raise TypeError(expected("layers", "True or False", repr(layers), do))
    _check_targets(method, targets, against)
    source = source_of(model, tokens, mask, check=check, batch=True)
    ids = [
        None if x is None else _ids(model, x, source.shape, name, check)
        for name, x in (("targets", targets), ("against", against))
    ]
    return _flow(model, source, *ids, method=method, layers=bool(layers))


def _check_targets(method: str, targets: Any, against: Any) -> None:
    """Raises for targets that a method would not read, and where it misses them."""
    reads = method in TO_LOGITS
    for name, ids in (("targets", targets), ("against", against)):
        missing = reads and name == "targets" and ids is None
        if missing or (ids is not None and not reads):
            must = f"{'token ids' if reads else 'None'} with method={method!r}"
            got, do = "None" if missing else "token ids", f"only {TO_LOGITS} contribute to a logit"
            raise ValueError(expected(name, must, got, do))


def _ids(model: Transformer, ids: Any, shape: tuple[int, ...], name: str, check: bool) -> Array:
    """Token ids of every position: one for all, one a row, or one each."""
    try:
        each = np.ndim(ids) == 2
    except ValueError:  # a ragged list
        each = False
    ids = checked_ids(model.config, ids, shape if each else shape[:1], name=name, check=check)
    # One a row is the same target at each of its positions.
    return ids if each else jnp.broadcast_to(ids[:, None], shape)


@compiled("method", "layers")
def _flow(
    model: Transformer,
    source: Source,
    targets: Int[Array, "B T"] | None,
    against: Int[Array, "B T"] | None,
    *,
    method: str,
    layers: bool,
) -> InformationFlow:
    if targets is not None:
        complete = method == "alti_logit_complete"
        return InformationFlow(**logit_flow(model, source, targets, against, complete, layers))
    real = source.padding.real

    def step(state: tuple, layer: Layer) -> tuple[tuple, dict[str, Array]]:
        flow, empty = state
        contributions, facts = _contributions(model, layer, method)
        rows, total = normalised(contributions)
        if layers:  # `[L,B,T,S]`: only if asked for
            facts |= {"layers": rows, "total": total}
        # The mixture after the layer: that of each position it reads, in this layer's shares.
        return (contract("BTN,BNS->BTS", rows, flow), empty | ((total == 0) & real)), facts

    # These two read patterns alone, so that a stream with nothing else will do.
    fields = ("pattern",) if method in ("attention", "rollout") else BROUGHT_FIELDS
    start = (identity(real, model.config.acc), jnp.zeros(real.shape, bool))
    _, walked = source.over_layers(model, fields, start, step)
    flow, empty = walked.state
    return InformationFlow(tokens=flow, empty=empty, **walked.found)


def _contributions(
    model: Transformer, layer: Layer, method: str
) -> tuple[Float[Array, "B T S"], dict[str, Array]]:
    """A layer's contributions before rows are normalised, and what else the method tells."""
    if method in ("attention", "rollout"):
        mean = layer.stream.pattern.astype(model.config.acc).mean(1)
        kept = identity(layer.stream.mask, mean.dtype)
        return mean if method == "attention" else mean + kept, {}
    brought = attention_brought(model, layer)
    if method == "value_weighted":
        return brought_norms(brought), {}
    if method == "mixing":
        norms, ratio = mixing(brought)
        return norms, {"mixing_ratio": ratio}
    return alti(brought), {}
