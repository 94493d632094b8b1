"""How alike the stream's points arrange the tokens: linear CKA, a diagnostic."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.checks import Mask, Tokens
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import over_points
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.points import Points, centred, kept_tokens, point_capture, stream_points
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

# How many entries of Gram matrices exist at a time, over all points.
ENTRIES = 2**24


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class CKA(Record):
    """Linear CKA between all pairs of P stream points.

    Attributes:
        value: `[P,P]`, symmetric, at most 1; about 0 for unrelated points (it may be negative).
        points: the points' names, as `(field, layer)`; the last is `("final", None)`.
    """

    value: Float[Array, "P P"]
    points: Points = field(metadata={"static": True})


def linear_cka(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    *,
    first: bool = True,
    mask: Mask | None = None,
    check: bool = False,
) -> CKA:
    """Linear centred kernel alignment between all pairs of stream points, over real tokens.

    `cka_pq = hsic_pq / sqrt(hsic_pp hsic_qq)`, where `hsic` is the unbiased estimate from the Gram
    matrices of the n tokens without their diagonals, `G` and `H`:
    `sum(G * H) + sum(G) sum(H) / ((n-1)(n-2)) - 2 sum_i (G 1)_i (H 1)_i / (n-2)`, up to a factor
    that cancels. (The biased one tends to 1 if there are fewer tokens than dimensions.) It does
    not change when a point is rotated, scaled or shifted, and its diagonal is 1.

    A diagnostic of which layers are alike, not a measure of how far anything moves: it is ruled by
    the directions of largest variance, and two points may be alike while a feature that matters is
    rewritten. Leave out the first position where activations there are massive.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream (resid_pre, resid_mid and final), then not
            run again.
        first: False leaves out each row's first real token.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        `[P,P]` values, and the points' names (as in `movement_matrix`). Zero for a point where all
        vectors are the same.

    Raises:
        ValueError: if fewer than 4 tokens are left.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> linear_cka(model, tokens, mask=mask).value.shape
        (9, 9)

    Reference:
        Kornblith et al. 2019; Song et al. 2012 for the unbiased estimate; Nguyen et al. 2021.
    """
    return over_points(_run_cka, _cka, model, tokens, mask, check, first=first, least=4)


@compiled("first")
def _run_cka(model, tokens, mask, *, first):
    capture = point_capture(model.config)
    return _of_stream(model, model(tokens, mask=mask, capture=capture).residuals, first)


@compiled("first")
def _cka(model, stream, *, first):
    return _of_stream(model, stream, first)


def _of_stream(model: Transformer, stream: ResidualStream, first: bool) -> CKA:
    points, names = stream_points(model.config, stream)
    return CKA(value=cka(points, kept_tokens(stream, first)), points=names)


def cka(points: Float[Array, "P B T D"], kept: Bool[Array, "B T"]) -> Float[Array, "P P"]:
    """The uncompiled method, on any vectors."""

    def prepared(x: Float[Array, "B T D"]) -> Float[Array, "N D"]:
        x = centred(x, kept)
        return ratio(x, jnp.sqrt(jnp.square(x).sum() / kept.sum()))

    x_PND = jax.lax.map(prepared, points)
    # The rows of a centred Gram matrix sum to zero: those without the diagonal, to minus it.
    rows_PN = -jnp.square(x_PND).sum(-1)
    n = kept.sum().astype(rows_PN.dtype)
    total = rows_PN.sum(-1)
    hsic = _shared(x_PND) + total[:, None] * total[None] / ((n - 1) * (n - 2))
    hsic = hsic - 2 * contract("PN,QN->PQ", rows_PN, rows_PN) / (n - 2)
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(hsic), 0))
    value = ratio(ratio(hsic, scale[:, None]), scale[None])
    return jnp.where(n < 4, jnp.nan, value)


def _shared(x_PND: Float[Array, "P N D"]) -> Float[Array, "P P"]:
    """`sum_ij G_ij H_ij` of all pairs of Gram matrices without diagonals, rows in blocks."""
    n_points, n, _ = x_PND.shape
    size = min(n, max(ENTRIES // (n_points * n), 1))

    def add(total: Array, start: Array) -> tuple[Array, None]:
        row = jnp.minimum(start, n - size) + jnp.arange(size)
        block = jax.lax.dynamic_slice_in_dim(x_PND, row[0], size, axis=1)
        gram = contract("PmD,PND->PmN", block, x_PND)
        used = (row >= start)[:, None] & (row[:, None] != jnp.arange(n)[None])
        gram = jnp.where(used[None], gram, 0)
        return total + contract("PmN,QmN->mPQ", gram, gram).sum(0), None

    zero = jnp.zeros((n_points, n_points), x_PND.dtype)
    return jax.lax.scan(add, zero, jnp.arange(0, n, size))[0]
