"""How much each position brings to each other one in a layer.

Euclidean norms come from products of heads: no vector exists for a pair of positions. Sums of
absolute values need those vectors, and build them in blocks of bounded size.
"""

from collections.abc import Callable
from math import isqrt
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Float, Int, over
from arrakis_jax.core.numerics import contract, norm, ratio
from arrakis_jax.frozen.attention import Brought

# The most elements of [B,S,H,D], the vectors that heads bring from a block of sources.
HEAD_ELEMENTS = 2**22
# The most elements of [B,T,S,D] or [B,T,S,H,D], the vectors of a block of pairs of positions.
PAIR_ELEMENTS = 2**24


def in_blocks(function: Callable[..., Any], size: int, *arrays: Array) -> Any:
    """`function(first, *blocks)` of at most `size` entries of axis 1 at a time, joined there.

    `first` is the index of a block's first entry.
    """
    n = arrays[0].shape[1]
    count = -(-n // max(size, 1))
    size = -(-n // count)  # blocks of equal size, so that little is padded

    # The axis of blocks goes in front, where `map` takes it, and the padding is cut off again.
    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * size - n), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], count * size, *x.shape[3:])[:, :n]

    # Gradients run a block again: its vectors are as large as what blocks are there to avoid.
    body = jax.checkpoint(lambda xs: function(*xs), prevent_cse=False)
    firsts = size * jnp.arange(count)
    return jax.tree.map(join, jax.lax.map(body, (firsts, *map(split, arrays))))


def weights_of(brought: Brought) -> Float[Array, "B H T S"]:
    """The factor of `v[s,h] w_o[h]` on its way from s to t."""
    return brought.pattern * brought.share[:, None, :, None]


def on_diagonal(x: Float[Array, "B T S"], value: Float[Array, "B T"]) -> Float[Array, "B T S"]:
    """`x` with these values from each position to itself."""
    return jnp.where(_eye(x), value[..., None], x)


def identity(real: Bool[Array, "B T"], dtype: Any) -> Float[Array, "B T S"]:
    """Every real position from itself alone."""
    shape = (*real.shape, real.shape[-1])
    return on_diagonal(jnp.zeros(shape, dtype), real.astype(dtype))


def normalised(x: Float[Array, "B T S"]) -> tuple[Float[Array, "B T S"], Float[Array, "B T"]]:
    """Rows divided by their sums (0 by 0 is 0), and the sums."""
    total = x.sum(-1)
    return ratio(x, total[..., None]), total


def to_itself(brought: Brought) -> Float[Array, "B T D"]:
    """What heads bring from each position to itself."""
    weight_BTH = jnp.moveaxis(jnp.diagonal(weights_of(brought), axis1=2, axis2=3), 1, 2)
    return contract("BTHK,HKD->BTD", weight_BTH[..., None] * brought.v, brought.w_o)


def brought_norms(brought: Brought) -> Float[Array, "B T S"]:
    """`|sum_h a[h,t,s] u[s,h]|` with `u = v w_o`.

    Its square is `sum_hn a[h,t,s] a[n,t,s] (u[s,h] . u[s,n])`: products of heads at a source s,
    `[B,S,H,H]`, serve every destination t.
    """
    batch, n_heads = brought.pattern.shape[:2]

    def block(_: Int[Array, ""], a_BSHT: Array, v_BSHK: Array) -> Array:
        u_BSHD = contract("BSHK,HKD->BSHD", v_BSHK, brought.w_o)
        gram_BSHN = contract("BSHD,BSND->BSHN", u_BSHD, u_BSHD)
        return (contract("BSHN,BSNT->BSHT", gram_BSHN, a_BSHT) * a_BSHT).sum(2)

    size = HEAD_ELEMENTS // (batch * n_heads * brought.w_o.shape[-1])
    a_BSHT = jnp.transpose(weights_of(brought), (0, 3, 1, 2))
    square_BTS = in_blocks(block, size, a_BSHT, brought.v).swapaxes(1, 2)
    zero = square_BTS <= 0  # rounding can make it negative; NaN is not, and stays
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square_BTS)))


def mixing(brought: Brought) -> tuple[Float[Array, "B T S"], Float[Array, "B T"]]:
    """Norms of what each position brings, the stream's own included, and the mixing ratio.

    The ratio is the norm of what all other positions bring over that plus what is kept.
    """
    itself_BTD = to_itself(brought)
    kept_BT, others_BT = norm(itself_BTD + brought.own), norm(brought.brought - itself_BTD)
    return on_diagonal(brought_norms(brought), kept_BT), ratio(others_BT, others_BT + kept_BT)


def nearness(part: Float[Array, "... D"], whole: Float[Array, "... D"]) -> Float[Array, "..."]:
    """By how much a part p brings zero nearer to the whole y: `max(0, |y|_1 - |y - p|_1)`."""
    # Term by term |y| - |y - p| = min(q, 2 |y| - q) with q = sign(y) p, which does not cancel.
    q = jnp.where(whole < 0, -1, 1).astype(part.dtype) * part
    return jnp.maximum(0, jnp.minimum(q, 2 * jnp.abs(whole) - q).sum(-1))


def brought_nearness(
    brought: Brought, whole: Float[Array, "B T D"], *, by_head: bool = False
) -> Float[Array, "B T S"]:
    """The nearness to `whole` of what each position brings; by head, `[B,T,S,H]`, of each head's.

    It needs the vector of every pair of positions. Blocks of sources times blocks of destinations
    are nearly square, because a block of sources computes `u = v w_o` once for all destinations.
    """
    batch, n_heads, length = brought.pattern.shape[:3]
    heads = n_heads if by_head else 1
    pairs = max(1, PAIR_ELEMENTS // (batch * heads * whole.shape[-1]))
    n_sources = min(length, isqrt(pairs))
    n_destinations = min(length, pairs // n_sources)

    def from_sources(first: Int[Array, ""], a_BSTH: Array, v_BSHK: Array) -> Array:
        u_BSHD = contract("BSHK,HKD->BSHD", v_BSHK, brought.w_o)

        def near(a_BTSH: Array, whole_BTD: Array) -> Array:
            if by_head:
                part_BTSHD = a_BTSH[..., None] * u_BSHD[:, None]
                return nearness(part_BTSHD, whole_BTD[:, :, None, None])
            part_BTSD = contract("BTSH,BSHD->BTSD", a_BTSH, u_BSHD)
            return nearness(part_BTSD, whole_BTD[:, :, None])

        def nothing(a_BTSH: Array, whole_BTD: Array) -> Array:
            return jnp.zeros(a_BTSH.shape if by_head else a_BTSH.shape[:-1], whole_BTD.dtype)

        def to_destinations(start: Int[Array, ""], a_BTSH: Array, whole_BTD: Array) -> Array:
            # Attention is causal: nothing is brought if every destination is before every source.
            earlier = start + a_BTSH.shape[1] <= first
            return jax.lax.cond(earlier, nothing, near, a_BTSH, whole_BTD)

        near_BTS = in_blocks(to_destinations, n_destinations, a_BSTH.swapaxes(1, 2), whole)
        return near_BTS.swapaxes(1, 2)

    a_BSTH = jnp.transpose(weights_of(brought), (0, 3, 2, 1))
    return in_blocks(from_sources, n_sources, a_BSTH, brought.v).swapaxes(1, 2)


def alti(brought: Brought) -> Float[Array, "B T S"]:
    """The nearness to the sum of what each position brings, the stream's own included."""
    # A position keeps its stream and what its heads bring from itself, as one vector.
    kept_BT = nearness(to_itself(brought) + brought.own, brought.total)
    return on_diagonal(brought_nearness(brought, brought.total), kept_BT)


def _eye(x: Float[Array, "B T S"]) -> Bool[Array, "B T S"]:
    return over(jnp.eye(x.shape[-1], dtype=bool), x)
