"""The stream at one point as the sum of all that was written before it, kept as factors."""

from __future__ import annotations

from typing import Any

from arrakis_jax.core.checks import Mask, checked_layers, checked_positions
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.source import Source, source_of
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.stream.residuals import ModelOutput, ResidualStream
from arrakis_jax.terms.capture import WHOLE, Kinds, checked_by, terms_stream
from arrakis_jax.terms.decomposition import Decomposition
from arrakis_jax.terms.points import Span, StreamPoint, checked_point
from arrakis_jax.terms.stream import checked_kinds, terms


def decompose(
    model: Transformer,
    residuals: ResidualStream | ModelOutput | Any,
    *,
    at: str | tuple[str, int] = "final",
    layer: int | None = None,
    by: str = "component",
    layers: tuple[int, ...] | None = None,
    kinds: tuple[str, ...] | None = None,
    positions: tuple[int, ...] | None = None,
    mask: Mask | None = None,
) -> Decomposition:
    """The terms that wrote the residual stream at one point.

    `x = embed + pos + sum_l (attn_l + mlp_l)`, with `attn_l = sum_h z_lh w_o[l,h] + b_o[l]` and
    `mlp_l = sum_n a_ln w_out[l,n] + b_out[l]`. With experts `mlp_l = sum_e g_le (sum_n a_len
    w_out[l,e,n] + b_out[l,e])`, where `g` is zero for experts that a token is not sent to.
    The terms sum to the stream at `at` (if no layers are left out). A head's term includes its
    value bias. Norms of outputs and norms on the stream have their scales frozen. They are then
    linear maps of every term, and their biases are terms. An edit of the stream itself (resid_pre,
    resid_mid, resid_post, final) adds no term, so the sum lacks the edit's change. The same holds
    for an edit of attn_out or mlp_out if finer terms than these are asked for.

    Args:
        model: the transformer.
        residuals: a captured stream (`capture_for(by)` names the fields), or token ids `[B,T]`,
            which are then run.
        at: "final", or `("resid_pre" | "resid_mid" | "resid_post", layer)`.
        layer: `layer=n` is short for `at=("resid_post", n)`.
        by: "component" (kinds embed, pos, attn, mlp), "head" (embed, pos, head, attn_bias, mlp),
            "neuron" (embed, pos, attn, neuron, mlp_bias; with experts neuron n of expert e is
            e * F + n, the shared expert's neurons follow, and mlp_bias counts experts),
            "expert" (embed, pos, attn, expert, shared_expert; mlp in layers without experts) or
            "source" (as "head", but each head is split by the position that it reads:
            `pattern[t,s] v_s w_o`; `label.source` is the column s of `tokens`).
            Kinds that the model does not have are left out. A norm's bias adds norm_bias. A model
            whose stream is rounded (`stream_dtype`) also has attn_rounding and mlp_rounding. Its
            captured stream must also have resid_pre, attn_out, resid_mid, mlp_out and final.
        layers: list the terms of these layers only; their sum is then not the stream.
        kinds: list the terms of these kinds only, such as `("head",)`.
        positions: these positions only, counted in real tokens (T in the result is their number).
        mask: `[B,T]`, with token ids.

    Returns:
        A Decomposition of C terms.

    Raises:
        NotCapturedError: if the stream lacks a field, a layer or a position that this needs.
        ValueError: for a point that the model does not have (resid_mid of a parallel block).

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom")
        >>> out = run(model, tokens, capture=capture_for("head"))
        >>> parts = decompose(model, out, by="head")
        >>> len(parts.labels), parts.labels[1], parts.norms().shape
        (21, Label(layer=0, kind='head', index=0, source=None), (21, 1, 4))
        >>> bool(jnp.allclose(parts.terms.sum(0), out.residuals.final, atol=1e-4))
        True

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Residual stream".
    """
    config = model.config
    checked_by(config, by)
    if layer is not None:
        if at != "final":
            do = "give one of them"
            raise ValueError(expected("at", "'final' when layer is given", repr(at), do))
        at = ("resid_post", layer)
    source = source_of(model, residuals, mask, name="residuals")
    if source.captured is not None:
        source.captured.need(all_positions=by in WHOLE)
    # All but the arrays is static: the terms and their labels depend on it, so it must be hashable.
    return _decompose(
        model,
        source,
        positions=checked_positions(positions, source.shape, source.mask),
        end=checked_point(at, config),
        by=by,
        layers=checked_layers(layers, config.n_layers),
        kinds=checked_kinds(kinds),
    )


@compiled("positions", "end", "by", "layers", "kinds")
def _decompose(
    model: Transformer,
    source: Source,
    *,
    positions: tuple[int, ...] | None,
    end: StreamPoint,
    by: str,
    layers: tuple[int, ...] | None,
    kinds: Kinds,
) -> Decomposition:
    stream, ranks = terms_stream(model, source, by, kinds=kinds, layers=layers, positions=positions)
    # From before the first layer, so that the embeddings are terms as well.
    span = Span(StreamPoint(0, 0), end)
    return Decomposition(*terms(model, stream, ranks, span, by=by, layers=layers, kinds=kinds))
