"""Where a padded batch has its real tokens. Sites zero the values at padding: nn/site.py."""

from dataclasses import dataclass

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Bool, Int, over


@dataclass(frozen=True)
class Padding:
    """Which columns of the T axis are real tokens; any axes before T are a batch.

    Attributes:
        mask: `[...,T]`, True at real tokens; None when every token is real.
        rank: `[...,T]`, a real token's position: how many real tokens come before it.
        count: `[...]`, the number of real tokens.
    """

    mask: Bool[Array, "... T"] | None
    rank: Int[Array, "... T"]
    count: Int[Array, "..."]

    @classmethod
    def of(cls, shape: tuple[int, ...], mask: Array | None) -> "Padding":
        """The padding of tokens of shape `[...,T]` with this mask."""
        if mask is None:
            rank = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
            return cls(None, rank, jnp.full(shape[:-1], shape[-1]))
        mask = jnp.asarray(mask, bool)
        # Padding before the first real token would count -1, which is no row of a position table.
        rank = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)
        return cls(mask, rank, mask.sum(-1))

    def after(self, n: int) -> "Padding":
        """The padding of the columns from `n` on; ranks and counts remain those of whole rows."""
        mask = None if self.mask is None else self.mask[..., n:]
        return Padding(mask, self.rank[..., n:], self.count)

    @property
    def real(self) -> Bool[Array, "... T"]:
        """The mask as an array, even when every token is real."""
        return jnp.ones(self.rank.shape, bool) if self.mask is None else self.mask

    def allowed(self, window: int | None = None) -> Bool[Array, "... T S"]:
        """Which keys each query may read.

        These are the real tokens up to its own position: the last `window`, or all of them.
        """
        t = self.rank.shape[-1]
        # Without padding one triangle serves all rows, and a window is a band of it.
        allowed = jnp.tril(jnp.ones((t, t), bool))[None]
        if self.mask is None:
            return allowed if window is None else jnp.triu(allowed, 1 - window)
        keys = self.mask[..., None, :]
        allowed = over(allowed[0], keys) & keys
        if window is None:
            return allowed
        return allowed & (self.rank[..., None] - self.rank[..., None, :] < window)

    def counted(self, wanted: Int[Array, "... N"]) -> Int[Array, "... N"]:
        """Positions counted from each row's first real token; negative ones count from its end."""
        count = self.count[..., None]
        wanted = over(wanted, count)
        return jnp.where(wanted < 0, wanted + count, wanted)

    def columns(
        self, wanted: Int[Array, "... N"]
    ) -> tuple[Int[Array, "... N"], Bool[Array, "... N"]]:
        """The columns of positions counted in real tokens, and which of these positions exist."""
        wanted = self.counted(wanted)
        # Padding has the rank of the last real token before it, so a hit must be real as well.
        hit_NT = (self.rank[..., None, :] == wanted[..., None]) & self.real[..., None, :]
        return jnp.argmax(hit_NT, -1), hit_NT.any(-1)


def select_positions(
    value: Array,
    index: Int[Array, "... N"] | None,
    valid: Bool[Array, "... N"] | None,
    axis: int,
    *,
    batch_axis: int = 0,
    absent: float = 0,
) -> Array:
    """`value` at these indices of its T axis, and `absent` where a row has no such position."""
    if index is None or valid is None:
        return value
    # `index [...,N]` has the batch axes and N; the other axes of `value` get size one.
    shape = [1] * value.ndim
    shape[batch_axis : batch_axis + index.ndim - 1] = index.shape[:-1]
    shape[axis] = index.shape[-1]
    picked = jnp.take_along_axis(value, index.reshape(shape), axis)
    return jnp.where(valid.reshape(shape), picked, absent)
