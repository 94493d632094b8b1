"""What each head looks at: the previous token, the first, an earlier copy, or what followed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import Mask, Tokens, checked_choice
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

_DEFINITIONS = ("mean", "mul")

Reduce = Callable[[Float[Array, "B H T S"]], dict[str, Float[Array, "H B"]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class HeadScores(Record):
    """How much of its attention each head gives to certain positions, in [0, 1].

    Attributes:
        previous: `[L,H,B]`, to the previous token.
        first: `[L,H,B]`, to the first token.
        duplicate: `[L,H,B]`, to the latest earlier copy of the current token.
        induction: `[L,H,B]`, to the token that followed that copy.
        repeats: `[B]`, how many tokens have an earlier copy: the queries of `duplicate`.
        queries: `[B]`, how many have a copy that another token followed: those of `induction`.
        definition: "mean" or "mul", see `head_scores`.
    """

    previous: Float[Array, "L H B"]
    first: Float[Array, "L H B"]
    duplicate: Float[Array, "L H B"]
    induction: Float[Array, "L H B"]
    repeats: Int[Array, " B"]
    queries: Int[Array, " B"]
    definition: str = field(metadata={"static": True})


def repeated_tokens(
    seed: int | np.random.Generator, ids: int | np.ndarray | list, *, n: int, batch: int, bos: int
) -> np.ndarray:
    """Rows of a first token and N random tokens, twice: `bos r_1..r_N r_1..r_N`.

    The N tokens of a row are drawn without replacement, so that none repeats but by design.

    Args:
        seed: a seed, or a numpy generator.
        ids: the token ids to draw from, or their number V for all of [0, V); `bos` is left out.
        n: N, how many tokens.
        batch: B, how many rows.
        bos: the id of the first token.

    Returns:
        `[B, 1 + 2N]` token ids, a numpy array.

    Raises:
        ValueError: if there are fewer than N ids.

    Example:
        >>> repeated_tokens(0, 451, n=25, batch=4, bos=1).shape
        (4, 51)

    Reference:
        Olsson et al. 2022, In-context Learning and Induction Heads.
    """
    rng = np.random.default_rng(seed)
    pool = np.asarray(ids)
    pool = np.arange(int(pool)) if pool.ndim == 0 else np.unique(pool)
    pool = pool[pool != bos]
    for name, value, most in (("n", n, len(pool)), ("batch", batch, None)):
        if value < 1 or (most is not None and value > most):
            must = "at least 1" if most is None else f"in [1, {most}], the number of ids but `bos`"
            raise ValueError(expected(name, must, value, "choose another number"))
    # Without replacement: every token of the second copy has exactly one earlier copy.
    once = np.stack([rng.choice(pool, n, replace=False) for _ in range(batch)])
    return np.concatenate([np.full((batch, 1), bos), once, once], 1)


def head_scores(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    *,
    definition: str = "mean",
    mask: Mask | None = None,
    check: bool = False,
) -> HeadScores:
    """How much every head attends to the previous token, the first, a copy, and what followed it.

    `score = mean over q of A[q, target(q)]`, over the queries q that have a target: `previous`
    q - 1, `first` 0 (both for q >= 1), `duplicate` the latest p < q of the same token,
    `induction` p + 1 (if p + 1 < q). Positions count real tokens.

    On `repeated_tokens` only the second copy has queries: q in N+1..2N, with targets q - N and
    q - N + 1. On text every token that occurred before is a query.

    Patterns exist for one layer at a time.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream with `pattern` and its tokens.
        definition: "mean" as above; "mul" as in TransformerLens' head detector: the share of all
            attention that lies on the targets, summed over all queries, the first one included.
            There every earlier copy is a target of `duplicate`, and every token that followed one
            a target of `induction` (the query itself included).
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        HeadScores of `[L,H,B]` arrays; 0 in rows without a query.

    Raises:
        ValueError: for a stream without a batch axis or tokens, or another definition.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens = repeated_tokens(0, 451, n=25, batch=8, bos=tokenizer.bos_token_id)
        >>> induction = head_scores(model, tokens).induction.mean(-1)
        >>> bool(induction.max() > 0.9), bool(jnp.median(induction) < 0.1)
        (True, True)

    Reference:
        Olsson et al. 2022, In-context Learning and Induction Heads.
    """
    checked_choice("definition", definition, _DEFINITIONS)
    source = source_of(model, tokens, mask, check=check, batch=True)
    if source.captured is not None and source.captured.tokens is None:
        do = "hand over the stream as `run` returned it"
        raise ValueError(expected("residuals", "a stream with its tokens", "none", do))
    return _scores(model, source, definition=definition)


@compiled("definition")
def _scores(model: Transformer, source: Source, *, definition: str) -> HeadScores:
    tokens = source.tokens if source.captured is None else source.captured.tokens
    assert tokens is not None
    padding, acc = source.padding, model.config.acc
    copies_BTS = _copies(tokens, padding)
    latest = _latest(copies_BTS, padding)
    if definition == "mean":
        reduce = _mean_at(latest, acc)
    else:
        reduce = _share_on(_targets(copies_BTS, padding))

    # Patterns are reduced inside of the walk: those of one layer exist at a time.
    def step(state: None, layer: Layer) -> tuple[None, dict[str, Array]]:
        return state, reduce(layer.stream.pattern.astype(acc))

    _, walked = source.over_layers(model, ("pattern",), None, step)
    return HeadScores(
        **walked.found,
        repeats=copies_BTS.any(-1).sum(-1),
        queries=latest["induction"][1].sum(-1),
        definition=definition,
    )


def _copies(tokens: Int[Array, "B T"], padding: Padding) -> Bool[Array, "B T S"]:
    """Which earlier positions hold the token of each position."""
    same = tokens[:, :, None] == tokens[:, None, :]
    earlier = jnp.tril(jnp.ones(same.shape[1:], bool), -1)
    real = padding.real
    return same & earlier[None] & real[:, :, None] & real[:, None, :]


def _latest(
    copies_BTS: Bool[Array, "B T S"], padding: Padding
) -> dict[str, tuple[Int[Array, "B T"], Bool[Array, "B T"]]]:
    """For each kind of score, where each query's target stands on S, and which queries have one."""
    t = copies_BTS.shape[-1]
    copied = copies_BTS.any(-1)
    copy_BT = t - 1 - jnp.argmax(jnp.flip(copies_BTS, -1), -1)  # argmax takes the first of equals
    after_BT = jnp.take_along_axis(padding.rank, copy_BT, -1) + 1
    followed = copied & (after_BT < padding.rank)
    later = padding.real & (padding.rank > 0)
    targets = {
        "previous": (padding.rank - 1, later),
        "first": (jnp.zeros_like(padding.rank), later),
        "induction": (after_BT, followed),
    }
    # Targets are counted in real tokens; patterns are indexed by column.
    columns = {name: (padding.columns(rank)[0], valid) for name, (rank, valid) in targets.items()}
    return columns | {"duplicate": (copy_BT, copied)}


def _mean_at(targets: dict[str, tuple[Array, Array]], acc: jnp.dtype) -> Reduce:
    """The mean attention of each head to one target of each query: `[B,H,T,S]` to `[H,B]`."""

    def mean(pattern_BHTS: Array, index_BT: Array, valid_BT: Array) -> Float[Array, "H B"]:
        at_BHT = jnp.take_along_axis(pattern_BHTS, index_BT[:, None, :, None], -1)[..., 0]
        # Queries without a target have an index all the same, which is masked here.
        total_HB = jnp.where(valid_BT[:, None], at_BHT, 0).sum(-1).T
        return ratio(total_HB, valid_BT.sum(-1)[None].astype(acc))

    return lambda pattern_BHTS: {
        name: mean(pattern_BHTS, *target) for name, target in targets.items()
    }


def _targets(copies_BTS: Bool[Array, "B T S"], padding: Padding) -> dict[str, Bool[Array, "B T S"]]:
    """For each kind of score, which positions count as targets in TransformerLens' definition."""
    rank, real = padding.rank, padding.real
    both = real[:, :, None] & real[:, None, :]
    distance = rank[:, :, None] - rank[:, None, :]
    first = jnp.broadcast_to(rank[:, None, :] == 0, both.shape)
    # A token followed a copy if the token before it is the copy.
    back_BS = padding.columns(jnp.maximum(rank - 1, 0))[0]
    followed = jnp.take_along_axis(copies_BTS, back_BS[:, None, :], -1) & (rank > 0)[:, None]
    return {
        "previous": both & (distance == 1),
        "first": both & first,
        "duplicate": copies_BTS,
        "induction": both & followed & (distance >= 0),
    }


def _share_on(targets: dict[str, Bool[Array, "B T S"]]) -> Reduce:
    """The share of each head's attention that lies on targets: `[B,H,T,S]` to `[H,B]`."""

    def reduce(pattern_BHTS: Float[Array, "B H T S"]) -> dict[str, Array]:
        total_BH = pattern_BHTS.sum((-2, -1))
        return {
            name: ratio(jnp.where(target_BTS[:, None], pattern_BHTS, 0).sum((-2, -1)), total_BH).T
            for name, target_BTS in targets.items()
        }

    return reduce
