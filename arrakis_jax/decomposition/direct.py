"""The stream at one point as the sum of everything written before it, kept as factors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arrakis_jax.axes import Array, Float, Int
from arrakis_jax.checks import (
    Mask,
    checked_choice,
    checked_count,
    checked_layer,
    checked_layers,
    checked_positions,
    checked_tokens,
)
from arrakis_jax.config import ModelConfig
from arrakis_jax.decomposition.terms import (
    BY,
    CAPTURE,
    STREAM_NORMS,
    Factor,
    fields_for,
    terms,
)
from arrakis_jax.errors import expected
from arrakis_jax.forward import compiled, stream_of
from arrakis_jax.labels import Labels
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import contract, norm
from arrakis_jax.places import Places
from arrakis_jax.residuals import Capture, ModelOutput, Record, ResidualStream

POINTS = ("resid_pre", "resid_mid", "resid_post")


def capture_for(by: str) -> tuple[str, ...]:
    """The fields that `decompose` and `logit_attribution` need of a stream, for `run`."""
    checked_choice("by", by, BY)
    return (*CAPTURE[by], *STREAM_NORMS, "final", "norm_final_scale")


def checked_by(config: ModelConfig, by: Any) -> None:
    """Raises ValueError unless a model of this config can be taken apart so."""
    checked_choice("by", by, BY)
    if by == "expert" and not config.n_experts:
        must = f"one of {BY[:-1]} in a model without experts"
        raise ValueError(expected("by", must, repr(by), "choose one"))


class Top(NamedTuple):
    """The largest terms: their `value [k,B,T]`, and their `index [k,B,T]` in the labels."""

    value: Array
    index: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Decomposition(Record):
    """The terms of a sum, in the order in which the model writes them, as factors.

    A vector term is held as it is, a head's as `z` and the model's `w_o`, a neuron's as its
    activation and `w_out`: nothing is expanded until asked for. Everything is zero at padding.

    Attributes:
        first: `[n,B,T,D]`, the terms before the layers (embed, pos).
        layered: for each segment of layers, per kind, a `Factor`.
        labels: what each of the C terms is.
    """

    first: Float[Array, "n B T D"]
    layered: tuple[tuple["Factor", ...], ...]
    labels: Labels = field(metadata={"static": True})

    def project(self, directions: Float[Array, "N D"]) -> Float[Array, "C B T N"]:
        """Each term's inner product with each direction, without expanding any term.

        Summed over C it is the inner product of the decomposed stream point.
        """
        directions = jnp.asarray(directions, self.first.dtype)
        if directions.ndim != 2 or directions.shape[1] != self.first.shape[-1]:
            must, do = f"`[N,{self.first.shape[-1]}]`", "stack directions on axis 0"
            raise ValueError(expected("directions", must, f"shape {directions.shape}", do))
        first = contract("C...D,ND->C...N", self.first, directions)
        return self._assemble(first, lambda factor: factor.project(directions))

    def along(self, direction: Float[Array, "B T D"]) -> Float[Array, "C B T"]:
        """Each term's inner product with one direction per position."""
        first = contract("C...D,...D->C...", self.first, direction)
        return self._assemble(first, lambda factor: factor.along(direction))

    def norms(self) -> Float[Array, "C B T"]:
        """Each term's Euclidean norm, without expanding any term."""
        return self._assemble(norm(self.first), Factor.norms)

    def top(self, k: int) -> Top:
        """The k terms of largest norm at every position."""
        norms_BTC = jnp.moveaxis(self.norms(), 0, -1)
        checked_count("k", k, norms_BTC.shape[-1])
        value, index = jax.lax.top_k(norms_BTC, k)
        return Top(jnp.moveaxis(value, -1, 0), jnp.moveaxis(index, -1, 0))

    @property
    def terms(self) -> Float[Array, "C B T D"]:
        """All terms as vectors; refused above 2 GiB (see `expand`)."""
        return self.expand()

    def expand(self, byte_limit: int = 2**31) -> Float[Array, "C B T D"]:
        """All terms as vectors.

        Raises:
            ValueError: if they would take more than `byte_limit` bytes.
        """
        shape = (len(self.labels), *self.first.shape[1:])
        size = prod(shape) * self.first.dtype.itemsize
        if size > byte_limit:
            must = f"at least the {size} bytes of terms of shape {shape}"
            do = "raise it, or use project, norms or top, which never expand"
            raise ValueError(expected("byte_limit", must, byte_limit, do))
        return self._assemble(self.first, Factor.expand)

    def _assemble(self, first: Array, of: Callable[["Factor"], Array]) -> Array:
        """Joins `[n,...]` and per kind `[L,m,...]` into `[C,...]`, in writing order."""
        joined = [first]
        for factors in self.layered:
            values = [of(factor) for factor in factors]
            layers = max(value.shape[0] for value in values)
            # What the last layer has not written yet at resid_mid: zeros, cut off below.
            padded = [
                jnp.pad(v, [(0, layers - v.shape[0])] + [(0, 0)] * (v.ndim - 1)) for v in values
            ]
            terms = jnp.concatenate(padded, axis=1)
            joined.append(terms.reshape(-1, *terms.shape[2:]))
        return jnp.concatenate(joined)[: len(self.labels)]


def decompose(
    model: Transformer,
    residuals: ResidualStream | ModelOutput | Any,
    *,
    at: str | tuple[str, int] = "final",
    layer: int | None = None,
    by: str = "component",
    layers: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None,
    mask: Mask | None = None,
) -> Decomposition:
    """What wrote the residual stream at one point.

    `x = embed + pos + sum_l (attn_l + mlp_l)`, with `attn_l = sum_h z_lh w_o[l,h] + b_o[l]` and
    `mlp_l = sum_n a_ln w_out[l,n] + b_out[l]`; with experts `mlp_l = sum_e g_le (sum_n a_len
    w_out[l,e,n] + b_out[l,e])`, `g` zero for experts that a token is not sent to.
    The terms sum to the stream at `at` (if no layers are left out). A head's term includes its
    value bias. What attention or MLP writes through a norm, or what the stream itself is put
    through, has that norm's scale frozen as it was: a linear map of every term (and the norm's
    bias, a term). What an edit of the stream itself (resid_pre, resid_mid, resid_post, final)
    adds is no term: the sum then lacks it; so with an edit of attn_out or mlp_out, where finer
    terms than these are asked for.

    Args:
        model: the transformer.
        residuals: a captured stream (`capture_for(by)` names the fields), or token ids `[B,T]`,
            which are then run.
        at: "final", or `("resid_pre" | "resid_mid" | "resid_post", layer)`.
        layer: `layer=n` is short for `at=("resid_post", n)`.
        by: "component" (kinds embed, pos, attn, mlp), "head" (embed, pos, head, attn_bias, mlp),
            "neuron" (embed, pos, attn, neuron, mlp_bias; with experts neuron n of expert e is
            e * F + n, those of the shared expert follow, and mlp_bias counts experts) or
            "expert" (embed, pos, attn, expert, shared_expert; mlp in layers without experts).
            Kinds that the model does not have are left out; norm_bias is added where there is
            one. A model whose stream is rounded (`stream_dtype`) also has attn_rounding and
            mlp_rounding, and needs a stream captured with resid_pre, attn_out, resid_mid, mlp_out
            and final besides.
        layers: list the terms of these layers only; their sum is then not the stream.
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
    ends = checked_point(at, config)
    layers = checked_layers(layers, config.n_layers)
    stream = stream_of(residuals, mask)
    if stream is not None:
        stream.need("mask")
        positions = checked_positions(positions, stream.mask.shape, stream.mask)
        return _decompose(model, stream, ends=ends, by=by, layers=layers, positions=positions)
    tokens, mask = checked_tokens(config, residuals, mask, name="residuals")
    positions = checked_positions(positions, tokens.shape, mask)
    return _run_and_decompose(
        model, tokens, mask, ends=ends, by=by, layers=layers, positions=positions
    )


@compiled("ends", "by", "layers", "positions")
def _decompose(model, stream, *, ends, by, layers, positions):
    return factors(model, *located(stream, positions), ends=ends, by=by, layers=layers)


@compiled("ends", "by", "layers", "positions")
def _run_and_decompose(model, tokens, mask, *, ends, by, layers, positions):
    capture = Capture(fields_for(model.config, by), positions=positions)
    stream = model(tokens, mask=mask, capture=capture).residuals
    return factors(model, *located(stream, positions), ends=ends, by=by, layers=layers)


def checked_point(at: Any, config: ModelConfig) -> tuple[int, int]:
    """How many layers' attention and MLP are written before the point `at`."""
    n_layers = config.n_layers
    if at == "final":
        return n_layers, n_layers
    if not (isinstance(at, tuple) and len(at) == 2 and at[0] in POINTS):
        must, do = f"'final' or ({POINTS}, layer)", "such as ('resid_post', 3)"
        raise ValueError(expected("at", must, repr(at), do))
    if config.parallel and at[0] == "resid_mid":
        do = "attention and MLP of a parallel block write at once; use resid_post"
        raise ValueError(expected("at", "a point that the model has", repr(at), do))
    layer = checked_layer(at[1], n_layers, name="layer")
    if not isinstance(layer, int):
        do = "the number of terms depends on it; use residual_decomposition for a traced layer"
        raise TypeError(expected("layer", "an int", "a traced value", do))
    return layer + (at[0] != "resid_pre"), layer + (at[0] == "resid_post")


def located(
    stream: ResidualStream, positions: tuple[int, ...] | None
) -> tuple[ResidualStream, Int[Array, "... T"]]:
    """The stream at these positions, and how many real tokens stand before each of them."""
    stream.need("mask")
    places = Places.of(stream.mask.shape, stream.mask)
    positions = stream.positions if positions is None else positions
    if positions is None:
        return stream, places.position
    return stream.at(positions), places.number(jnp.array(positions, int))


def factors(
    model: Transformer,
    stream: ResidualStream,
    position: Int[Array, "..."],
    *,
    ends: tuple[int, int],
    by: str,
    layers: tuple[int, ...] | None = None,
) -> Decomposition:
    """The uncompiled `decompose` of a located stream, whatever its axes between L and D."""
    first, layered, labels = terms(model, stream, position, ends=ends, by=by, layers=layers)
    return Decomposition(first=first, layered=layered, labels=labels)
