"""The logit lens: the model's predictions if it stopped at each point of the stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import (
    Ids,
    Mask,
    Tokens,
    checked_count,
    checked_ids,
    checked_positions,
)
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.stream.points import Points, point_fields, stream_points
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

# How many logits exist at a time, unless a chunk is asked for; and the least size of a chunk.
LOGITS, LEAST = 2**24, 512


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class LogitLens(Record):
    """The model's own readout of each of P stream points.

    Attributes:
        logit: `[P,B,T]`, the targets' logits; None without targets.
        log_prob: `[P,B,T]`, the targets' log-probabilities, in nats; None without targets.
        rank: `[P,B,T]`, how many tokens have a larger logit than the target (0: the target is the
            most likely); None without targets.
        top_tokens: `[P,B,T,k]`, the most likely tokens, the likeliest first.
        top_log_probs: `[P,B,T,k]`, their log-probabilities.
        entropy: `[P,B,T]`, the entropy of the distribution over the vocabulary, in nats.
        kl: `[P,B,T]`, `KL(final || point)`, in nats: how far the point's distribution is from the
            model's own, which is the last point's.
        points: the points' names, as `(field, layer)`; the last is `("final", None)`.
    """

    logit: Float[Array, "P B T"] = ABSENT
    log_prob: Float[Array, "P B T"] = ABSENT
    rank: Int[Array, "P B T"] = ABSENT
    top_tokens: Int[Array, "P B T k"]
    top_log_probs: Float[Array, "P B T k"]
    entropy: Float[Array, "P B T"]
    kl: Float[Array, "P B T"]
    points: Points = field(metadata={"static": True})


def logit_lens(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    targets: Ids | None = None,
    *,
    k: int = 5,
    positions: tuple[int, ...] | None = None,
    mask: Mask | None = None,
    chunk: int | None = None,
    check: bool = False,
) -> LogitLens:
    """The predictions at every point of the stream, by the model's own readout.

    `logits_p = softcap(m (norm_f(x_p) W_U + b_U))`: the final norm with its own scale at each
    point, then projection, unembedding, bias, factor and soft-cap as the model has them. The
    logits of the last point are the model's. The vocabulary is read in chunks, so that the logits
    of one point and one chunk exist at a time. Without a chunk asked for, several points are read
    at once if their logits are few (`2**24`). With targets, all chunks before the last target's
    chunk are read twice, because a rank must compare logits from the same product.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream (resid_pre, resid_mid and final), which is
            not run again.
        targets: token ids whose logit, log-probability and rank are wanted: an int, `[B]`, or
            `[B,T]` (`[B,N]` with N positions); None for none.
        k: how many of the most likely tokens to name.
        positions: the N positions to read out, counted in real tokens (-1 is each row's last); T is
            then N. None for all.
        mask: `[B,T]`, with token ids.
        chunk: how many tokens of the vocabulary to read out at a time; None for about
            `2**24 / (B T)`.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        The lens of P stream points (as in `movement_matrix`), in logits and nats; zero at padding
        and where a row has no such position.

    Raises:
        NotCapturedError: if a captured stream lacks a point or position.
        ValueError, TypeError, IndexError: for targets, k, chunk or positions that do not fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> found = logit_lens(model, tokens, token_id(tokenizer, " Tom"), k=3, mask=mask)
        >>> found.rank.shape, found.top_tokens.shape, found.points[1]
        ((9, 2, 4), (9, 2, 4, 3), ('resid_mid', 0))

    Reference:
        nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    config = model.config
    checked_count("k", k, config.vocab_size)
    if chunk is not None:
        checked_count("chunk", chunk, config.vocab_size)
    source = source_of(model, tokens, mask, check=check, batch=True)
    chosen = checked_positions(positions, source.shape, source.mask)
    chosen = source.held if chosen is None else chosen
    shape = (source.shape[0], source.shape[1] if chosen is None else len(chosen))
    if targets is not None:
        targets = _checked_targets(config, targets, shape, check)
    n_places, group = prod(shape), None
    if chunk is None:
        chunk = _chunk(config, n_places)
        group = _group(n_places, chunk)
    options = {"k": int(k), "chunk": int(chunk), "group": group}
    # The positions of a captured stream are static, and a choice of them must be so, too. Positions
    # of token ids are traced, so that other positions do not compile again.
    if source.held is not None:
        return _lens(model, source, targets, None, columns=chosen, **options)
    at = None if chosen is None else jnp.array(chosen, jnp.int32)
    return _lens(model, source, targets, at, columns=None, **options)


def _checked_targets(config: ModelConfig, targets: Any, shape: tuple[int, int], check: bool):
    """The targets as `[B]` or `[B,N]`."""
    try:
        one_a_row = np.ndim(targets) == 1
    except ValueError:
        # Ragged targets have no shape. `checked_ids` raises the error that names them.
        one_a_row = False
    return checked_ids(config, targets, shape[:1] if one_a_row else shape, check=check)


def _chunk(config: ModelConfig, n_places: int) -> int:
    """The number of tokens in a chunk, chosen so that all chunks have nearly one size."""
    # The last chunk overlaps the one before it, so an even split repeats the fewest products.
    most = max(LOGITS // max(n_places, 1), LEAST)
    n_chunks = -(-config.vocab_size // most)
    return -(-config.vocab_size // n_chunks)


def _group(n_places: int, chunk: int) -> int | None:
    """How many points are read out at once; None for one after another.

    With few positions a product is thin: reading the unembedding takes longer than multiplying.
    """
    group = LOGITS // max(n_places * chunk, 1)
    return group if group > 1 else None


@compiled("columns", "k", "chunk", "group")
def _lens(
    model: Transformer,
    source: Source,
    targets: Array | None,
    at: Int[Array, " N"] | None,
    *,
    columns: tuple[int, ...] | None,
    k: int,
    chunk: int,
    group: int | None,
) -> LogitLens:
    fields = point_fields(model.config)
    stream = source.stream(model, fields, at=at if columns is None else columns)
    return lens(model, stream, targets, k, chunk, group)


class Found(NamedTuple):
    """The results for a point from the chunks so far: sums over tokens, and the largest logits.

    Attributes:
        most: the largest logit `m`.
        total: the sum of `e = exp(logit - m)`.
        below: the sum of `e (m - logit)`, whose terms are all >= 0.
        apart: the sum of `exp(f - m_f) (f - logit)`, with `f` the last point's logit.
        logit: the target's logit; NaN before its chunk.
        larger: how many logits, from the target's chunk on, are larger than the target's.
        top: the largest logits.
        tokens: the tokens of the largest logits.
    """

    most: Float[Array, "B T"]
    total: Float[Array, "B T"]
    below: Float[Array, "B T"]
    apart: Float[Array, "B T"]
    logit: Float[Array, "B T"]
    larger: Int[Array, "B T"]
    top: Float[Array, "B T k"]
    tokens: Int[Array, "B T k"]

    @classmethod
    def none(cls, shape: tuple[int, ...], k: int, dtype: jnp.dtype) -> Found:
        """The state before the first chunk."""
        zero = jnp.zeros(shape, dtype)
        return cls(
            # Below any logit, and finite: the difference of two infinities would be NaN.
            most=jnp.full(shape, jnp.finfo(dtype).min / 2, dtype),
            total=zero,
            below=zero,
            apart=zero,
            logit=jnp.full(shape, jnp.nan, dtype),
            larger=jnp.zeros(shape, jnp.int32),
            top=jnp.full((*shape, k), -jnp.inf, dtype),
            tokens=jnp.zeros((*shape, k), jnp.int32),
        )


class Chunk(NamedTuple):
    """The tokens `ids [V]` of a chunk. `new` marks ids >= `start`, which no earlier chunk has."""

    ids: Int[Array, " V"]
    new: Bool[Array, " V"]
    start: Int[Array, ""]

    @classmethod
    def at(cls, start: Array, size: int, vocab: int) -> Chunk:
        """The chunk from `start`, moved back if it would reach beyond the vocabulary."""
        # All chunks have one size, as a scan needs. The last one repeats tokens: `new` skips them.
        ids = jnp.minimum(start, vocab - size) + jnp.arange(size, dtype=jnp.int32)
        return cls(ids, ids >= start, start)


def lens(
    model: Transformer,
    stream: ResidualStream,
    targets: Array | None,
    k: int,
    chunk: int,
    group: int | None,
) -> LogitLens:
    """The method before compilation, with one target for each row or for each vector."""
    config, vocab = model.config, model.config.vocab_size
    points, names = stream_points(model.config, stream)
    real, norm = stream.mask, model.norm_final
    if norm is not None:
        # One point at a time, because the norm works in float32 or wider.
        points = jax.lax.map(lambda x: norm(x, Sites(mask=real), "norm_final_scale"), points)
    wanted = None
    if targets is not None:
        wanted = jnp.where(real, targets if targets.ndim == 2 else targets[:, None], 0)
    starts = jnp.arange(0, vocab, chunk, dtype=jnp.int32)
    group = None if group is None else min(group, len(names))

    def all_of(sums: Found, start: Array) -> tuple[Found, None]:
        piece, final = Chunk.at(start, chunk, vocab), model.unembed(points[-1], start, chunk)
        before = sums.most[-1]
        after = jnp.maximum(before, jnp.where(piece.new, final, -jnp.inf).max(-1))

        # A backward pass recomputes the logits. Otherwise it would keep all of them.
        @partial(jax.checkpoint, prevent_cse=False)
        def of_point(point: tuple[Array, Found]) -> Found:
            logits = model.unembed(point[0], start, chunk)
            sums = _with_chunk(point[1], logits, piece, wanted)
            return sums._replace(apart=_apart(sums.apart, logits, final, piece, before, after))

        return jax.lax.map(of_point, (points, sums), batch_size=group), None

    shape = (len(names), *real.shape)
    sums = jax.lax.scan(all_of, Found.none(shape, k, config.acc), starts)[0]
    # A target's logit is known only from its chunk on. Earlier chunks are compared with it now.
    rank = sums.larger
    if wanted is not None and len(starts) > 1:
        rank = rank + _larger_before(model, points, sums.logit, wanted, starts[:-1], chunk, group)
    return _result(sums, rank, real, names, wanted is not None)


def _with_chunk(
    sums: Found, logits: Array, piece: Chunk, wanted: Int[Array, "B T"] | None
) -> Found:
    """The results so far, with the logits `[B,T,V]` of one more chunk."""
    # A running log-sum-exp: each sum is relative to the largest logit so far, and is rescaled when
    # that grows. So no exponential overflows. All results are the same for any reference, hence
    # the stopped gradient.
    ids, new = piece.ids, piece.new
    fresh = jnp.where(new, logits, -jnp.inf)
    most = jax.lax.stop_gradient(jnp.maximum(sums.most, fresh.max(-1)))
    rescale, less = jnp.exp(sums.most - most), most[..., None] - logits
    share = jnp.where(new, jnp.exp(-less), 0)
    total = sums.total * rescale
    # Each term of `below` grows by the rise of the largest logit.
    below = sums.below * rescale + total * (most - sums.most)

    # Two small steps, so that the large array is searched only once. Earlier tokens come first:
    # of equal logits the lower id stays.
    k = sums.top.shape[-1]
    top, index = jax.lax.top_k(fresh, min(k, len(ids)))
    tops = jnp.concatenate([sums.top, top], -1)
    tokens = jnp.concatenate([sums.tokens, ids[0] + index], -1)
    top, index = jax.lax.top_k(tops, k)
    sums = sums._replace(
        most=most,
        total=total + share.sum(-1),
        below=below + contract("...V,...V->...", share, jnp.where(new, less, 0)),
        top=top,
        tokens=jnp.take_along_axis(tokens, index, -1),
    )
    if wanted is None:
        return sums
    column = jnp.clip(wanted - ids[0], 0, len(ids) - 1)[..., None]
    target_logit = jnp.take_along_axis(logits, column, -1)[..., 0]
    inside = (wanted >= piece.start) & (wanted <= ids[-1])
    logit = jnp.where(inside, target_logit, sums.logit)
    # Before the target's chunk its logit is NaN, and no comparison with NaN is true.
    larger = (fresh > logit[..., None]).sum(-1, dtype=jnp.int32)
    return sums._replace(logit=logit, larger=sums.larger + larger)


def _apart(
    apart: Array, logits: Array, final: Array, piece: Chunk, before: Array, after: Array
) -> Array:
    """`Found.apart` with one more chunk; `before` and `after` are the last point's `most`."""
    before, after = jax.lax.stop_gradient((before, after))
    share = jnp.where(piece.new, jnp.exp(final - after[..., None]), 0)
    apart = apart * jnp.exp(before - after)
    change = jnp.where(piece.new, final - logits, 0)
    return apart + contract("...V,...V->...", share, change)


def _larger_before(
    model: Transformer,
    points: Float[Array, "P B T D"],
    logit: Float[Array, "P B T"],
    wanted: Int[Array, "B T"],
    starts: Int[Array, " n"],
    chunk: int,
    group: int | None,
) -> Int[Array, "P B T"]:
    """How many logits in the chunks before the target's chunk are larger than the target's."""

    def add(larger: Array, start: Array) -> tuple[Array, None]:
        # The chunk is computed only if some target comes after it.
        later = wanted >= start + chunk

        def of_point(point: tuple[Array, Array]) -> Array:
            larger = model.unembed(point[0], start, chunk) > point[1][..., None]
            return jnp.where(later, larger.sum(-1, dtype=jnp.int32), 0)

        def count() -> Array:
            return larger + jax.lax.map(of_point, (points, logit), batch_size=group)

        return jax.lax.cond(later.any(), count, lambda: larger), None

    # Counts have no gradient, so a backward pass skips these products.
    points, logit = jax.lax.stop_gradient((points, logit))
    return jax.lax.scan(add, jnp.zeros(logit.shape, jnp.int32), starts)[0]


def _result(sums: Found, rank: Array, real: Array, names: Points, targeted: bool) -> LogitLens:
    log_total = jnp.log(sums.total)
    normaliser = sums.most + log_total
    last = jax.tree.map(lambda x: x[-1:], sums)
    # KL = sum p_f (f - logit) + log Z - log Z_f. So one pass is enough: each Z enters at its end.
    kl = sums.apart / last.total + (normaliser - normaliser[-1:])

    def at_real(x: Array) -> Array:
        return jnp.where(real.reshape(1, *real.shape, *(1,) * (x.ndim - 3)), x, 0)

    target: dict[str, Any] = {}
    if targeted:
        target = {
            "logit": at_real(sums.logit),
            "log_prob": at_real(sums.logit - normaliser),
            # A NaN logit is larger than none and would look like the most likely token.
            "rank": at_real(jnp.where(jnp.isnan(sums.logit), -1, rank)),
        }
    return LogitLens(
        **target,
        top_tokens=at_real(sums.tokens),
        top_log_probs=at_real(sums.top - normaliser[..., None]),
        # Both summands are >= 0, so no digits cancel.
        entropy=at_real(log_total + sums.below / sums.total),
        # Rounding can make a vanishing KL negative.
        kl=at_real(jnp.maximum(kl, 0)),
        points=names,
    )
