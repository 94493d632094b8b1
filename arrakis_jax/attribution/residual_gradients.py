"""Gradients of a target at every site of the forward, in one backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import (
    Ids,
    Mask,
    Tokens,
    checked_layers,
    checked_positions,
    checked_tokens,
)
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target, read_target
from arrakis_jax.nn.transformer import Edits, Transformer
from arrakis_jax.stream.capture import Capture, as_capture
from arrakis_jax.stream.fields import INTERNAL, SCALES, UNSTACKED, lacking
from arrakis_jax.stream.residuals import ResidualStream


def target_value(
    model: Transformer,
    x_BTD: Float[Array, "B T D"],
    mask: Array | None,
    target: Target,
    *,
    taps: dict[str, Any] | None = None,
    capture: tuple[str, ...] = (),
    edits: Edits = (),
) -> tuple[Float[Array, " B"], ResidualStream]:
    """The target of each row from the embedded stream, unembedding only what it reads."""
    # `final` and not logits: a target unembeds only the positions that it reads.
    fields = tuple(dict.fromkeys((*capture, "final")))
    stream = model.after_embedding(
        x_BTD, mask=mask, capture=Capture(fields), taps=taps, edits=edits
    ).residuals
    return read_target(model, stream.final, mask, target), stream


def tapped_gradients(
    model: Transformer,
    x_BTD: Float[Array, "B T D"],
    mask: Array | None,
    target: Target,
    sites: tuple[str, ...],
    capture: tuple[str, ...] = (),
) -> tuple[Float[Array, " B"], dict[str, Array], ResidualStream]:
    """Each row's target, its gradient at these sites, and the captured stream."""

    # One backward pass: rows do not interact, so the gradient of their sum holds each row's own.
    def total(taps: dict[str, Array]) -> tuple[Array, tuple]:
        value, stream = target_value(model, x_BTD, mask, target, taps=taps, capture=capture)
        return value.sum(), (value, stream)

    gradients, (value, stream) = jax.grad(total, has_aux=True)(_zeros(model, x_BTD, mask, sites))
    return value, gradients, stream


def _zeros(
    model: Transformer, x_BTD: Array, mask: Array | None, sites: tuple[str, ...]
) -> dict[str, Array]:
    """Taps of zeros at these sites, shaped as the forward records them."""
    # Shapes come from an abstract forward: mlp_act has other shapes in other segments.
    forward: Callable = model.after_embedding
    shapes = jax.eval_shape(lambda x: forward(x, mask=mask, capture=sites).residuals, x_BTD)
    acc = model.config.acc
    zeros = partial(jax.tree.map, lambda shape: jnp.zeros(shape.shape, acc))
    return {name: zeros(getattr(shapes, name)) for name in sites}


def residual_gradients(
    model: Transformer,
    tokens: Tokens,
    targets: Ids | Target | Callable,
    *,
    against: Ids | None = None,
    position: int | Array = -1,
    mask: Mask | None = None,
    capture: str | tuple[str, ...] | Capture = "residuals",
    check: bool = False,
) -> ResidualStream:
    """The gradient of a target at every site, in one backward pass.

    Where attention and MLP write straight to the stream, `attn_out` has the gradient of
    `resid_mid`, and `mlp_out` has the gradient of the next `resid_pre` (or `final`). In parallel
    blocks both have the gradient of the next `resid_pre`. A head's written vector (after norms of
    the output and multipliers) has the gradient of `attn_out`. The choice of experts is held fixed,
    their weights are not.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids.
        targets: the token whose logit is differentiated, an int or `[B]`; or any target, such as
            `LogProb(3)`, or a function of logits.
        against: a token whose logit is subtracted, or None.
        position: where the logit is read, counted in real tokens: an int or `[B]`.
        mask: `[B,T]`.
        capture: the sites: "residuals" (the stream's own), "all" (q, k, v, pattern, z and mlp_act
            too), a tuple of names, or a Capture, which also selects layers and positions of the
            result. Norm scales have no gradient here.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        A ResidualStream whose fields hold gradients, in units of the target per unit; norm
        scales are None, and everything is zero at padding.

    Raises:
        TypeError, ValueError, IndexError: for tokens, targets or a capture that do not fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> residual_gradients(model, tokens, 3, mask=mask, capture="all").pattern.shape
        (4, 2, 4, 4, 4)

    Reference:
        Activation gradients by zero-valued taps; cost two forwards, since weight gradients are
        never formed.
    """
    tokens, mask = checked_tokens(model.config, tokens, mask, check=check)
    target = checked_target(
        model, tokens, targets, mask, against=against, position=position, name="targets"
    )
    wanted = as_capture(capture)
    # Scales have no gradient of their own, and a choice of experts has none.
    names = tuple(n for n in wanted.fields if n not in (*SCALES, "logits", "routing"))
    layers = checked_layers(wanted.layers, model.config.n_layers)
    positions = checked_positions(wanted.positions, tokens.shape, mask)
    return _residual_gradients(
        model, tokens, mask, target, sites=names, layers=layers, positions=positions
    )


@compiled("sites", "layers", "positions")
def _residual_gradients(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    target: Target,
    *,
    sites: tuple[str, ...],
    layers: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
) -> ResidualStream:
    config = model.config
    lacks = lacking(config)
    sites = tuple(s for s in sites if s not in lacks)
    inside = tuple(s for s in sites if s in INTERNAL)
    x_BTD = model.embed(tokens, mask=mask)
    # A write that is simply added has the stream's gradient behind it, and needs no tap.
    writes = ("attn_out", "mlp_out") if config.norms_stream else ()
    taps = tuple(s for s in ("resid_pre", "resid_mid", "final", *writes, *inside) if s not in lacks)
    _, gradients, stream = tapped_gradients(model, x_BTD, mask, target, taps)
    resid_pre, final = gradients["resid_pre"], gradients["final"]
    following = jnp.concatenate([resid_pre, final[None]])  # row l + 1 is what layer l writes to
    every: dict[str, Any] = {
        "embed": following[0],
        "attn_out": following[1:] if config.parallel else gradients["resid_mid"],
        "mlp_out": following[1:],
    } | gradients
    chosen: dict[str, Any] = {name: every[name] for name in sites}
    if layers is not None:
        chosen = {n: _of_layers(model, x, layers, n) for n, x in chosen.items()}
    # Layers and positions are chosen afterwards: the backward pass goes through all of them anyway.
    result = ResidualStream(
        **chosen, tokens=tokens, mask=stream.mask, layers=layers, lacks=lacks,
        normed=config.norms_stream,
    )  # fmt: skip
    return result if positions is None else result.at(positions)


def _of_layers(model: Transformer, gradient: Any, layers: tuple[int, ...], name: str) -> Any:
    """The gradient at these layers, whether it is one array or one for each segment."""
    if name in UNSTACKED:
        return gradient
    if not isinstance(gradient, tuple):
        return gradient[jnp.array(layers, int)]
    # One array for each segment, whose rows are the segment's own layers.
    sizes = [n for _, n in model.config.segments]
    rows = [
        jnp.array([layer - end + n for layer in layers if end - n <= layer < end], int)
        for end, n in zip(accumulate(sizes), sizes, strict=True)
    ]
    return tuple(
        None if part is None else part[kept] for part, kept in zip(gradient, rows, strict=True)
    )
