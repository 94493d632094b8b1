"""One pass over the layers: each layer's fields go to a function as it runs, and nowhere else.

What reads attention patterns or neurons reduces them here, so that they exist for one layer at a
time. The pass runs the model, or goes over a stream that was captured.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arrakis_jax.axes import Array, Float, over
from arrakis_jax.config import ModelConfig
from arrakis_jax.errors import expected
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Layer, Transformer
from arrakis_jax.numerics import contract
from arrakis_jax.residuals import SEGMENTED, UNSTACKED, ResidualStream

Step = Callable[[Any, Layer], tuple[Any, Any]]


class Passed(NamedTuple):
    """What a pass over the layers leaves.

    Attributes:
        stream: the stream outside of the layers: embed, final, norm_final_scale, mask.
        state: the last state.
        found: for each segment of layers, what the function found, stacked over its layers.
    """

    stream: ResidualStream
    state: Any
    found: list[Any]

    @property
    def stacked(self) -> Any:
        """What was found, stacked over all layers, where segments do not differ."""
        return jax.tree.map(lambda *x: jnp.concatenate(x), *self.found)


def over_layers(
    model: Transformer,
    source: Array | ResidualStream,
    mask: Array | None,
    fields: tuple[str, ...],
    state: Any,
    step: Step,
) -> Passed:
    """Hands these fields of each layer to `step(state, layer) -> (state, found)`, first to last.

    `source` is token ids `[B,T]`, with their mask, or a captured stream `[L,B,T,...]`, which must
    hold the fields (`embed`, `final` and `norm_final_scale` only where named).
    """
    if not isinstance(source, ResidualStream):
        inside = tuple(name for name in fields if name not in UNSTACKED)
        x_BTD = model.embed(source, mask=mask)
        return Passed(*model.fold(x_BTD, state, step, mask=mask, fields=inside))
    source.need("mask", *fields, all_layers=True, all_positions=True)
    inside = [n for n in fields if n not in UNSTACKED and n not in source.lacks]
    told = source.resid_pre is not None and source.final is not None
    posts = source.resid_post if told else None
    found = []
    for i, (blocks, layers) in enumerate(model.parts()):
        rows = slice(layers.start, layers.stop)
        own = {name: _of(source, name, i, rows) for name in inside}
        own = {name: value for name, value in own.items() if value is not None}

        def stepping(state: Any, xs: tuple) -> tuple[Any, Any]:
            block, index, fields, resid_post = xs
            stream = ResidualStream(
                **fields, mask=source.mask, lacks=source.lacks, normed=source.normed
            )
            return step(state, Layer(block, index, stream, resid_post))

        post = None if posts is None else posts[rows]
        xs = (blocks, jnp.arange(layers.start, layers.stop), own, post)
        state, result = jax.lax.scan(stepping, state, xs)
        found.append(result)
    return Passed(source, state, found)


def _of(stream: ResidualStream, name: str, i: int, rows: slice) -> Any:
    """A field of the layers of segment i."""
    value = getattr(stream, name)
    if name in SEGMENTED and isinstance(value, tuple):
        return value[i]
    return jax.tree.map(lambda x: x[rows], value)


def batch_of(stream: ResidualStream) -> ResidualStream:
    """The stream; ValueError unless it has a batch axis."""
    stream.need("mask")
    if stream.mask.ndim != 2:
        do = "hand over the whole stream, and select from the result"
        got = f"one example, with a mask of shape {stream.mask.shape}"
        raise ValueError(expected("residuals", "a batch, `[B,T]`", got, do))
    return stream


class Read(NamedTuple):
    """What attention of one layer brings from every source position j to every position i.

    The vector that head h brings is `share_i pattern[h,i,j] v[j,h] w_o[h]`, and position i itself
    brings `own_i`. With `bias_i`, which no position brings, they sum to `total_i`. All as written
    to the stream: through norms of the output and of the stream, scales as they were, and factors.

    Attributes:
        pattern: `[B,H,T,S]`, attention probabilities.
        v: `[B,S,H,K]`, values; those of a key/value head for each of its query heads.
        w_o: `[H,K,D]`.
        share: `[B,T]`.
        own: `[B,T,D]`, the stream that attention adds to.
        total: `[B,T,D]`, the stream after attention, before the MLP.
        brought: `[B,T,D]`, what heads bring from all positions together.
        bias: `[B,T,D]`, the output's bias and those of norms.
    """

    pattern: Float[Array, "B H T S"]
    v: Float[Array, "B S H K"]
    w_o: Float[Array, "H K D"]
    share: Float[Array, "B T"]
    own: Float[Array, "B T D"]
    total: Float[Array, "B T D"]
    brought: Float[Array, "B T D"]
    bias: Float[Array, "B T D"]


READ = ("resid_pre", "attn_out", "resid_mid", "pattern", "v", "norm_attn_scale",
        "norm_attn_out_scale")  # fmt: skip


def read(model: Transformer, layer: Layer) -> Read:
    """What attention of this layer brings from where, of a layer with the fields `READ`."""
    config, stream, block = model.config, layer.stream, layer.block
    acc = config.acc
    through, share = written(config, stream, block.norm_attn_out, "attn")
    w_o = through(block.attn.w_o[...])
    own = stream.resid_pre.astype(acc)
    bias = _output_bias(model, layer)
    brought = stream.attn_out - bias
    if config.norms_stream:  # attention adds to the normed stream, or its sum is normed
        norm: Any = block.norm_attn
        own = norm.gained(norm.centre(own)) / stream.norm_attn_scale[..., None]
        if config.norm_placement == "stream_after":
            w_o = norm.gained(norm.centre(w_o))
            share = share / stream.norm_attn_scale
            bias, brought = (
                norm.gained(norm.centre(x)) / stream.norm_attn_scale[..., None]
                for x in (bias, brought)
            )
        bias = bias if norm.b is None else bias + over(norm.b[...].astype(acc), bias)
    if config.parallel:
        total = stream.resid_pre.astype(acc) + stream.attn_out
    else:
        total = stream.resid_mid.astype(acc)
    repeats = config.n_heads // config.n_kv_heads
    v = jnp.repeat(stream.v.astype(acc), repeats, -2)
    bias = jnp.where(stream.mask[..., None], bias, 0)
    return Read(stream.pattern.astype(acc), v, w_o, share, own, total, brought, bias)


def _output_bias(model: Transformer, layer: Layer) -> Float[Array, "B T D"]:
    """The biases in `attn_out`: of the product, through the norm of the output, and of the norm."""
    stream, b_o, norm = layer.stream, layer.block.attn.b_o, layer.block.norm_attn_out
    acc = model.config.acc
    bias = jnp.zeros(stream.attn_out.shape, acc)
    if b_o is not None:
        through, share = written(model.config, stream, norm, "attn")
        bias = share[..., None] * over(through(b_o[...]), bias)
    if norm is not None and norm.b is not None:
        bias = bias + over(norm.b[...].astype(acc), bias) * model.config.residual_scale
    return jnp.where(stream.mask[..., None], bias, 0)


def written(
    config: ModelConfig, stream: ResidualStream, norm: Norm | None, what: str
) -> tuple[Callable[[Array], Array], Float[Array, "B T"]]:
    """How an output of attention ("attn") or the MLP ("mlp") reaches the stream.

    Through the norm of the output, its scale as it was, and the model's factor: as a linear map of
    directions `[...,D]`, and what multiplies them at each position.
    """
    share = jnp.full(stream.mask.shape, config.residual_scale, config.acc)
    if norm is not None:
        share = share / getattr(stream, f"norm_{what}_out_scale")

    def through(w: Array) -> Array:
        w = w.astype(config.acc)
        return w if norm is None else norm.gained(norm.centre(w))

    return through, share


def logit_reader(
    model: Transformer, targets: Array, against: Array | None
) -> tuple[Float[Array, "... D"], Float[Array, "..."]]:
    """What reads a logit, or a difference of two, from the normed stream, and its bias."""
    u, bias = model.unembedding(targets), model.unembedding_bias(targets)
    if against is not None:
        u, bias = u - model.unembedding(against), bias - model.unembedding_bias(against)
    return u, bias


def logit_direction(model: Transformer, u: Float[Array, "... D"]) -> tuple[Array, Array]:
    """The stream direction `r` and the constant with `norm(x) . u = x . r / s + constant`."""
    if model.norm_final is None:
        return u, jnp.zeros(u.shape[:-1], u.dtype)
    r = model.norm_final.centre(model.norm_final.gained(u))
    if model.norm_final.b is None:
        return r, jnp.zeros(u.shape[:-1], u.dtype)
    return r, contract("...D,D->...", u, model.norm_final.b[...])
