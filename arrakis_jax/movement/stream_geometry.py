"""The shape of the stream at every point: its length, dimensionality and largest dimensions."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import Mask, Tokens, checked_count
from arrakis_jax.core.numerics import norm, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, point_source
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.points import Points, centred, kept_tokens, point_fields, stream_points
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class StreamGeometry(Record):
    """The shape of the stream at each of P points.

    Attributes:
        norm: `[P,B,T]`, the length of every vector; zero at padding.
        participation_ratio: `[P]`, `(sum v)^2 / sum v^2` of the variances v along the principal
            axes: between 1 and D.
        effective_rank: `[P]`, the exponential of the entropy of the singular values over their sum,
            of the centred vectors: between 1 and D. The largest rule it less.
        outlier_dims: `[P,k]`, the dimensions with the largest root mean square, largest first.
        outlier_size: `[P,k]`, their root mean square over that of all entries. Its square over D is
            the dimension's share of the mean squared norm: over all D they sum to 1.
        points: the points' names, as `(field, layer)`; the last is `("final", None)`.
    """

    norm: Float[Array, "P B T"]
    participation_ratio: Float[Array, " P"]
    effective_rank: Float[Array, " P"]
    outlier_dims: Int[Array, "P k"]
    outlier_size: Float[Array, "P k"]
    points: Points = field(metadata={"static": True})

    def growth(self) -> Float[Array, "P B T"]:
        """`[P-1,B,T]`, the length at each point but the first over that at the point before.

        Zero at padding. Products over consecutive points are the growth between their ends.
        """
        return ratio(self.norm[1:], self.norm[:-1])


def stream_geometry(
    model: Transformer,
    tokens: Tokens | ResidualStream | ModelOutput,
    *,
    k: int = 8,
    first: bool = True,
    mask: Mask | None = None,
    check: bool = False,
) -> StreamGeometry:
    """The length, dimensionality and outlier dimensions of the stream at every point.

    All but the lengths are statistics over the real tokens of the whole batch. With fewer tokens N
    than D no dimensionality exceeds N - 1: compare points, on the same tokens. Dimensionalities are
    of the vectors minus their mean, outliers of the vectors as they are.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids, or a captured stream (resid_pre, resid_mid and final), then not
            run again.
        k: how many outlier dimensions to name.
        first: False leaves out each row's first real token in the statistics. The stream there may
            be a hundred times longer than elsewhere, in a few dimensions, and would rule them.
        mask: `[B,T]`, with token ids.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        The geometry of P stream points (as in `movement_matrix`). Where all vectors are the same,
        dimensionalities are 0.

    Raises:
        ValueError: if fewer than two tokens are left, or for a k that is not in [1, D].

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> geometry = stream_geometry(model, tokens, k=3, mask=mask)
        >>> geometry.norm.shape, geometry.effective_rank.shape, geometry.outlier_dims.shape
        ((9, 2, 4), (9,), (9, 3))
        >>> geometry.growth().shape
        (8, 2, 4)

    Reference:
        Roy and Vetterli 2007, the effective rank; Gao et al. 2017, the participation ratio;
        Kovaleva et al. 2021, outlier dimensions; Sun et al. 2024, massive activations.
    """
    checked_count("k", k, model.config.d_model)
    source = point_source(model, tokens, mask, check, first=first, least=2)
    return _geometry(model, source, k=int(k), first=bool(first))


@compiled("k", "first")
def _geometry(model: Transformer, source: Source, *, k: int, first: bool) -> StreamGeometry:
    stream = source.stream(model, point_fields(model.config))
    points, names = stream_points(model.config, stream)
    # Lengths are of all real tokens, statistics of those kept.
    kept, real = kept_tokens(stream, first), kept_tokens(stream, True)
    acc = jnp.promote_types(points.dtype, jnp.float32)

    def at_point(x: Float[Array, "B T D"]) -> tuple[Array, ...]:
        x = x.astype(acc)
        square = jnp.where(kept[..., None], jnp.square(x), 0).reshape(-1, x.shape[-1]).sum(0)
        size, dims = jax.lax.top_k(jnp.sqrt(ratio(square, square.mean())), k)
        # Not from the eigenvalues of a Gram matrix: the small ones would be rounding.
        singular = jnp.linalg.svd(centred(x, kept), compute_uv=False)
        lengths = jnp.where(real, norm(x), 0)
        return lengths, _participation(singular), _effective_rank(singular), dims, size

    # One point at a time: a singular value decomposition of all would hold P copies of the batch.
    lengths, participation, rank, dims, size = jax.lax.map(at_point, points)
    return StreamGeometry(
        norm=lengths,
        participation_ratio=participation,
        effective_rank=rank,
        outlier_dims=dims,
        outlier_size=size,
        points=names,
    )


def _participation(singular: Float[Array, " m"]) -> Float[Array, ""]:
    variance = jnp.square(ratio(singular, singular.max()))  # up to a factor, so that none overflows
    return ratio(jnp.square(variance.sum()), jnp.square(variance).sum())


def _effective_rank(singular: Float[Array, " m"]) -> Float[Array, ""]:
    total = singular.sum()
    share = ratio(singular, total)
    entropy = -(share * jnp.log(jnp.where(share == 0, 1, share))).sum()
    return jnp.where(total == 0, 0, jnp.exp(entropy))
