"""Directions that read the stream before its norms: the transposes of norms with frozen scales."""

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
    """What reads a logit (or the difference of two) from the normed stream: direction and bias."""
    u, bias = model.unembedding(targets), model.unembedding_bias(targets)
    if against is not None:
        u, bias = u - model.unembedding(against), bias - model.unembedding_bias(against)
    return u, bias


def logit_direction(model: Transformer, u: Float[Array, "... D"]) -> tuple[Array, Array]:
    """The direction `r` and the constant c such that `norm(x) . u = x . r / s + c`."""
    if model.norm_final is None:
        return u, jnp.zeros(u.shape[:-1], u.dtype)
    r = model.norm_final.transposed(u)
    if model.norm_final.b is None:
        return r, jnp.zeros(u.shape[:-1], u.dtype)
    return r, contract("...D,D->...", u, model.norm_final.b[...])


class LayerReader(NamedTuple):
    """The directions that read one layer's stream, before and after each norm on the stream.

    To read a value before a norm, multiply by that norm's factor; before two norms, by both.
    Without norms on the stream all directions are equal and all factors 1.

    Attributes:
        pre: `[B,T,D]`, reads what enters the norm of attention.
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
    """For each layer, the direction that gives what `r` gives at the end, up to frozen scales.

    A norm on the stream with a frozen scale s is linear: reading its output along r is reading its
    input along `transposed(r) / s`. So the directions go backward through the norms. They are kept
    at length 1, and their lengths as factors, so that neither grows over many layers.

    Attributes:
        first: `[B,T,D]`, reads the embedding.
        size: `[B,T]`, the length of `r`, by which every value is multiplied.
        posts: `[L,B,T,D]`, read each layer's output. None without norms on the stream: `first`
            then serves all layers.
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
        # The other two directions are computed from this one, so only one of three is stored.
        post = self.posts[layer.index]
        mid, mlp = _before(layer.block.norm_mlp, post)
        pre, attn = _before(layer.block.norm_attn, mid)
        stream = layer.stream
        return LayerReader(
            pre, mid, post, attn / stream.norm_attn_scale, mlp / stream.norm_mlp_scale
        )


def _before(stream_norm: Norm | None, r: Array) -> tuple[Array, Array]:
    """What reads before a norm, but for its scale, as `r` does after it: unit vector and length."""
    assert stream_norm is not None
    r = stream_norm.transposed(r)
    size = norm(r)
    return ratio(r, size[..., None]), size
