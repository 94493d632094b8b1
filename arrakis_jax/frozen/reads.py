"""Directions that read the stream, with all scales frozen: the transposes of the writes."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.numerics import contract, norm, ratio
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.nn.walk import Place, walk


def logit_reader(
    model: Transformer, targets: Array, against: Array | None
) -> tuple[Float[Array, "... D"], Float[Array, "..."]]:
    """The direction that reads a logit (or the difference of two) from the normed stream; bias."""
    u, bias = model.unembedding(targets), model.unembedding_bias(targets)
    if against is not None:
        u, bias = u - model.unembedding(against), bias - model.unembedding_bias(against)
    return u, bias


def logit_direction(model: Transformer, u: Float[Array, "... D"]) -> tuple[Array, Array]:
    """The stream direction `r` and the constant with `norm(x) . u = x . r / s + constant`."""
    if model.norm_final is None:
        return u, jnp.zeros(u.shape[:-1], u.dtype)
    r = model.norm_final.transposed(u)
    if model.norm_final.b is None:
        return r, jnp.zeros(u.shape[:-1], u.dtype)
    return r, contract("...D,D->...", u, model.norm_final.b[...])


class LayerReader(NamedTuple):
    """The directions that read one layer's stream, before and after each norm on the stream.

    A value that is read before a norm is multiplied by that norm's factor, once for each norm that
    it still passes. Without norms on the stream all directions are equal.

    Attributes:
        pre: `[B,T,D]`, reads the sum that enters the norm of attention.
        mid: `[B,T,D]`, reads the stream after attention.
        post: `[B,T,D]`, reads the stream after the MLP.
        attn: `[B,T]`, the factor of the norm of attention.
        mlp: `[B,T]`, the factor of the norm of the MLP.
    """

    pre: Float[Array, "B T D"]
    mid: Float[Array, "B T D"]
    post: Float[Array, "B T D"]
    attn: Float[Array, "B T"]
    mlp: Float[Array, "B T"]


class StreamReader(NamedTuple):
    """The directions, at each layer, that read the value which r reads from the last output.

    A norm on the stream with a frozen scale s is linear: reading its output along r is reading its
    input along `transposed(r) / s`. So the directions go backward through the norms. They are kept
    at length 1, and their lengths as factors, so that neither grows over many layers.

    Attributes:
        first: `[B,T,D]`, reads the embedding.
        size: `[B,T]`, the length of the direction itself, a factor of all values.
        posts: `[L,B,T,D]`, read each layer's output; None where `first` reads everywhere.
    """

    first: Float[Array, "B T D"]
    size: Float[Array, "B T"]
    posts: Float[Array, "L B T D"] | None

    @classmethod
    def of(cls, model: Transformer, r: Float[Array, "B T D"]) -> "StreamReader":
        """The reader of the direction r."""
        if not model.config.norms_stream or not model.config.n_layers:
            return cls(r, jnp.ones_like(r[..., 0]), None)

        def back(post: Array, place: Place, _: Any) -> tuple[Array, Array]:
            mid = _before(place.block.norm_mlp, post)[0]
            return _before(place.block.norm_attn, mid)[0], post

        # The length leaves the directions here and comes back once, as a factor of the results.
        size = norm(r)
        walked = walk(model, back, ratio(r, size[..., None]), reverse=True)
        return cls(walked.state, size, walked.found)

    def at(self, layer: Layer) -> LayerReader:
        """The directions of this layer, with the observed scales of its norms."""
        if self.posts is None:
            unit = jnp.ones_like(self.size)
            return LayerReader(self.first, self.first, self.first, unit, unit)
        # The other two directions are computed from this one, so memory holds a third.
        post = self.posts[layer.index]
        mid, mlp = _before(layer.block.norm_mlp, post)
        pre, attn = _before(layer.block.norm_attn, mid)
        stream = layer.stream
        return LayerReader(
            pre, mid, post, attn / stream.norm_attn_scale, mlp / stream.norm_mlp_scale
        )


def _before(stream_norm: Norm | None, r: Array) -> tuple[Array, Array]:
    """The direction before a norm that matches `r` after it: as a unit vector and its length."""
    assert stream_norm is not None
    r = stream_norm.transposed(r)
    size = norm(r)
    return ratio(r, size[..., None]), size
