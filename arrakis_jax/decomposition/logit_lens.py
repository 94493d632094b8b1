"""What the model would predict if it stopped at each point of the stream: the logit lens."""

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

# How many logits exist at a time, unless a chunk is asked for; and the least chunk.
LOGITS, LEAST = 2**24, 512


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class LogitLens(Record):
    """What the model's own readout says of each of P stream points.

    Attributes:
        logit: `[P,B,T]`, the targets' logits; None without targets.
        log_prob: `[P,B,T]`, the targets' log-probabilities, in nats; None without targets.
        rank: `[P,B,T]`, how many tokens have a larger logit than the target (0: none, it is the
            most likely); None without targets.
        top_tokens: `[P,B,T,k]`, the most likely tokens, the likeliest first.
        top_log_probs: `[P,B,T,k]`, their log-probabilities.
        entropy: `[P,B,T]`, of the distribution over the vocabulary, in nats.
        kl: `[P,B,T]`, `KL(final || point)`, how far the point's distribution is from that of the
            last point (the model's own), in nats.
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

    `logits_p = softcap(m (norm_f(x_p) W_U + b_U))`: the final norm, with its scale taken anew at
    each point, then projection, unembedding, bias, factor and soft-cap as the model has them. The
    logits of the last point are the model's. The vocabulary is gone through in chunks, so that
    logits of one point, one chunk exist at a time; without a chunk asked for, those of several
    points if they are few (`2**24`). With targets all chunks before that of the last
    target are gone through twice: a rank compares logits that come from the same product.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream (resid_pre, resid_mid and final), then not
            run again.
        targets: token ids whose logit, log-probability and rank are wanted: an int, `[B]`, or
            `[B,T]` (`[B,N]` with N positions); None for none.
        k: how many of the most likely tokens to name.
        positions: N positions, counted in real tokens (-1 is each row's last), that alone are read
            out; T is then N. None for all.
        mask: `[B,T]`, with token ids.
        chunk: how many tokens of the vocabulary to read out at a time; None for about
            `2**24 / (B T)`.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        The lens of P stream points (as in `movement_matrix`), in logits and nats; zero at padding
        and where a row has no such position.

    Raises:
        NotCapturedError: if a stream is given that lacks a point or position.
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
    if source.held is not None:  # columns of what was captured, which must be known
        return _lens(model, source, targets, None, columns=chosen, **options)
    at = None if chosen is None else jnp.array(chosen, jnp.int32)
    return _lens(model, source, targets, at, columns=None, **options)


def _checked_targets(config: ModelConfig, targets: Any, shape: tuple[int, int], check: bool):
    """The targets as `[B]` or `[B,N]`."""
    try:
        one_a_row = np.ndim(targets) == 1
    except ValueError:  # ragged, which is refused below
        one_a_row = False
    return checked_ids(config, targets, shape[:1] if one_a_row else shape, check=check)


def _chunk(config: ModelConfig, n_places: int) -> int:
    """The tokens of a chunk, such that chunks are of nearly one size."""
    most = max(LOGITS // max(n_places, 1), LEAST)
    n_chunks = -(-config.vocab_size // most)
    return -(-config.vocab_size // n_chunks)


def _group(n_places: int, chunk: int) -> int | None:
    """How many points are read out at once; None for one after another.

    Few places make a product too thin: reading the unembedding takes longer than multiplying.
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
    """What the chunks so far say of a point: sums over their tokens, against the largest logit.

    Attributes:
        most: the largest logit `m`.
        total: the sum of `e = exp(logit - m)`.
        below: the sum of `e (m - logit)`, all of its terms >= 0.
        apart: the sum of `exp(f - m_f) (f - logit)`, with `f` the last point's logit.
        logit: the target's; NaN before its chunk.
        larger: how many logits, from the target's chunk on, are larger than the target's.
        top: the largest logits.
        tokens: whose they are.
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
    def none(cls, shape: tuple[int, ...], k: int, dtype: jnp.dtype) -> "Found":
        """Before the first chunk."""
        zero = jnp.zeros(shape, dtype)
        return cls(
            # Finite, so that no difference is NaN, and still less than any logit.
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
    """The tokens `ids [V]` of a chunk, and which of them are in no chunk before: those >= start."""

    ids: Int[Array, " V"]
    new: Bool[Array, " V"]
    start: Int[Array, ""]

    @classmethod
    def at(cls, start: Array, size: int, vocab: int) -> "Chunk":
        """The chunk from `start`, moved back where the vocabulary ends before it does."""
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
    """The uncompiled method; one target for each row or for each vector of the stream."""
    config, vocab = model.config, model.config.vocab_size
    points, names = stream_points(model.config, stream)
    real, norm = stream.mask, model.norm_final
    if norm is not None:
        points = jax.lax.map(lambda x: norm(x, Sites(mask=real), "norm_final_scale"), points)
    wanted = None
    if targets is not None:
        wanted = jnp.where(real, targets if targets.ndim == 2 else targets[:, None], 0)
    starts = jnp.arange(0, vocab, chunk, dtype=jnp.int32)
    group = None if group is None else min(group, len(names))

    def all_of(found: Found, start: Array) -> tuple[Found, None]:
        here, final = Chunk.at(start, chunk, vocab), model.unembed(points[-1], start, chunk)
        before = found.most[-1]
        after = jnp.maximum(before, jnp.where(here.new, final, -jnp.inf).max(-1))

        @partial(jax.checkpoint, prevent_cse=False)
        def of_point(point: tuple[Array, Found]) -> Found:
            logits = model.unembed(point[0], start, chunk)
            found = _with_chunk(point[1], logits, here, wanted)
            return found._replace(apart=_apart(found.apart, logits, final, here, before, after))

        return jax.lax.map(of_point, (points, found), batch_size=group), None

    shape = (len(names), *real.shape)
    found = jax.lax.scan(all_of, Found.none(shape, k, config.acc), starts)[0]
    # A target is met in its chunk: what came before is compared with it now.
    rank = found.larger
    if wanted is not None and len(starts) > 1:
        rank = rank + _larger_before(model, points, found.logit, wanted, starts[:-1], chunk, group)
    return _result(found, rank, real, names, wanted is not None)


def _with_chunk(
    found: Found, logits: Array, here: Chunk, wanted: Int[Array, "B T"] | None
) -> Found:
    """What is found when the logits `[B,T,V]` of one more chunk are taken in."""
    ids, new = here.ids, here.new
    fresh = jnp.where(new, logits, -jnp.inf)
    most = jax.lax.stop_gradient(jnp.maximum(found.most, fresh.max(-1)))
    rescale, less = jnp.exp(found.most - most), most[..., None] - logits
    share = jnp.where(new, jnp.exp(-less), 0)
    total = found.total * rescale
    below = found.below * rescale + total * (most - found.most)

    k = found.top.shape[-1]
    top, index = jax.lax.top_k(fresh, min(k, len(ids)))
    tops = jnp.concatenate([found.top, top], -1)
    tokens = jnp.concatenate([found.tokens, ids[0] + index], -1)
    top, index = jax.lax.top_k(tops, k)
    found = found._replace(
        most=most,
        total=total + share.sum(-1),
        below=below + contract("...V,...V->...", share, jnp.where(new, less, 0)),
        top=top,
        tokens=jnp.take_along_axis(tokens, index, -1),
    )
    if wanted is None:
        return found
    column = jnp.clip(wanted - ids[0], 0, len(ids) - 1)[..., None]
    own = jnp.take_along_axis(logits, column, -1)[..., 0]
    inside = (wanted >= here.start) & (wanted <= ids[-1])
    logit = jnp.where(inside, own, found.logit)
    larger = (fresh > logit[..., None]).sum(-1, dtype=jnp.int32)  # none before the target's chunk
    return found._replace(logit=logit, larger=found.larger + larger)


def _apart(
    apart: Array, logits: Array, final: Array, here: Chunk, before: Array, after: Array
) -> Array:
    """`Found.apart` with one more chunk, as the last point's largest logit grows."""
    before, after = jax.lax.stop_gradient((before, after))
    share = jnp.where(here.new, jnp.exp(final - after[..., None]), 0)
    apart = apart * jnp.exp(before - after)
    change = jnp.where(here.new, final - logits, 0)
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
    """How many logits of the chunks before the target's are larger than the target's."""

    def add(larger: Array, start: Array) -> tuple[Array, None]:
        later = wanted >= start + chunk

        def of_point(point: tuple[Array, Array]) -> Array:
            larger = model.unembed(point[0], start, chunk) > point[1][..., None]
            return jnp.where(later, larger.sum(-1, dtype=jnp.int32), 0)

        def count() -> Array:
            return larger + jax.lax.map(of_point, (points, logit), batch_size=group)

        return jax.lax.cond(later.any(), count, lambda: larger), None

    points, logit = jax.lax.stop_gradient((points, logit))
    return jax.lax.scan(add, jnp.zeros(logit.shape, jnp.int32), starts)[0]


def _result(found: Found, rank: Array, real: Array, names: Points, targeted: bool) -> LogitLens:
    log_total = jnp.log(found.total)
    normaliser = found.most + log_total
    last = jax.tree.map(lambda x: x[-1:], found)
    kl = found.apart / last.total + (normaliser - normaliser[-1:])

    def at_real(x: Array) -> Array:
        return jnp.where(real.reshape(1, *real.shape, *(1,) * (x.ndim - 3)), x, 0)

    target: dict[str, Any] = {}
    if targeted:
        target = {
            "logit": at_real(found.logit),
            "log_prob": at_real(found.logit - normaliser),
            "rank": at_real(jnp.where(jnp.isnan(found.logit), -1, rank)),
        }
    return LogitLens(
        **target,
        top_tokens=at_real(found.tokens),
        top_log_probs=at_real(found.top - normaliser[..., None]),
        entropy=at_real(log_total + found.below / found.total),
        kl=at_real(jnp.maximum(kl, 0)),
        points=names,
    )
