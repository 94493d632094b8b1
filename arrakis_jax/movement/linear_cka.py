"""How alike the stream's points arrange the tokens: linear CKA, a diagnostic."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.checks import Mask, Tokens
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, point_source
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.points import Points, centred, kept_tokens, point_fields, stream_points
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream

# The most entries of Gram matrices that exist at a time, over all points.
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

    A diagnostic of which layers are alike, not a measure of how far anything moves. The directions
    of largest variance rule it: two points may be alike while a feature that matters is rewritten.
    Leave out the first position where activations there are massive.

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
    source = point_source(model, tokens, mask, check, first=first, least=4)
    return _linear_cka(model, source, first=bool(first))


@compiled("first")
def _linear_cka(model: Transformer, source: Source, *, first: bool) -> CKA:
    stream = source.stream(model, point_fields(model.config))
    points, names = stream_points(model.config, stream)
    return CKA(value=cka(points, kept_tokens(stream, first)), points=names)


def cka(points: Float[Array, "P B T D"], kept: Bool[Array, "B T"]) -> Float[Array, "P P"]:
    """Linear CKA between P sets of any vectors, over the positions kept; not compiled."""

    def prepared(x: Float[Array, "B T D"]) -> Float[Array, "N D"]:
        x = centred(x, kept)
        # CKA does not change with a point's scale: of mean square 1, no sum of squares overflows.
        return ratio(x, jnp.sqrt(jnp.square(x).sum() / kept.sum()))

    x_PND = jax.lax.map(prepared, points)
    # A row of a centred Gram matrix sums to zero: without its diagonal entry, to minus that entry.
    rows_PN = -jnp.square(x_PND).sum(-1)
    n = kept.sum().astype(rows_PN.dtype)
    total = rows_PN.sum(-1)
    hsic = _shared(x_PND) + total[:, None] * total[None] / ((n - 1) * (n - 2))
    hsic = hsic - 2 * contract("PN,QN->PQ", rows_PN, rows_PN) / (n - 2)
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(hsic), 0))
    value = ratio(ratio(hsic, scale[:, None]), scale[None])
    return jnp.where(n < 4, jnp.nan, value)


def _shared(x_PND: Float[Array, "P N D"]) -> Float[Array, "P P"]:
    """`sum_ij G_ij H_ij` of all pairs of Gram matrices without diagonals, rows in blocks.

    The sum over tokens i and j cannot become one over dimensions, as it could with the diagonals.
    So Gram entries are formed, for a block of rows at a time, and every pair of points reads them.
    """
    n_points, n, _ = x_PND.shape
    size = min(n, max(ENTRIES // (n_points * n), 1))

    def add(total: Array, start: Array) -> tuple[Array, None]:
        # The last block begins early enough to be whole; its rows before `start` are not used.
        row = jnp.minimum(start, n - size) + jnp.arange(size)
        block = jax.lax.dynamic_slice_in_dim(x_PND, row[0], size, axis=1)
        gram = contract("PmD,PND->PmN", block, x_PND)
        used = (row >= start)[:, None] & (row[:, None] != jnp.arange(n)[None])
        gram = jnp.where(used[None], gram, 0)
        return total + contract("PmN,QmN->mPQ", gram, gram).sum(0), None

    zero = jnp.zeros((n_points, n_points), x_PND.dtype)
    return jax.lax.scan(add, zero, jnp.arange(0, n, size))[0]
