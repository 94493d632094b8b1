"""The stream at one point as the sum of everything written before it, kept as factors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.axes import Array, Float, Int
from arrakis_jax.checks import (
    Mask,
    checked_choice,
    checked_layer,
    checked_layers,
    checked_positions,
    checked_tokens,
)
from arrakis_jax.config import ModelConfig
from arrakis_jax.decomposition.factors import AnyFactor, Measured
from arrakis_jax.decomposition.parts import ATTENTION, BY, MLP
from arrakis_jax.decomposition.terms import (
    STREAM_NORMS,
    Kinds,
    Span,
    checked_kinds,
    fields_for,
    terms,
)
from arrakis_jax.decomposition.values import Top, table_of_largest, top
from arrakis_jax.errors import expected
from arrakis_jax.forward import compiled, stream_of
from arrakis_jax.labels import Labels
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import contract, norm
from arrakis_jax.places import Places
from arrakis_jax.residuals import Capture, ModelOutput, Record, ResidualStream
from arrakis_jax.table import Table

# By source, the fields that are read at every position whatever positions are asked for.
WHOLE = {"source": ("v",)}
POINTS = ("resid_pre", "resid_mid", "resid_post")


def capture_for(by: str) -> tuple[str, ...]:
    """The fields that `decompose` and `logit_attribution` need of a stream, for `run`."""
    checked_choice("by", by, BY)
    fields = ("embed", *ATTENTION[by], *MLP[by], *STREAM_NORMS, "final", "norm_final_scale")
    return tuple(dict.fromkeys(fields))


def checked_by(config: ModelConfig, by: Any) -> None:
    """Raises ValueError unless a model of this config can be taken apart so."""
    checked_choice("by", by, BY)
    if by == "expert" and not config.n_experts:
        must = f"one of {tuple(b for b in BY if b != 'expert')} in a model without experts"
        raise ValueError(expected("by", must, repr(by), "choose one"))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Decomposition(Record):
    """The terms of a sum, in the order in which the model writes them, as factors.

    A vector term is held as it is, a head's as `z` and the model's `w_o`, a neuron's as its
    activation and `w_out`: nothing is expanded until asked for. Everything is zero at padding.

    Attributes:
        first: `[n,B,T,D]`, the terms before the layers (embed, pos).
        layered: for each segment of layers, per kind, its factors, stacked over the layers.
        labels: what each of the C terms is.
    """

    first: Float[Array, "n B T D"]
    layered: tuple[tuple[AnyFactor, ...], ...]
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
        return self._assemble(norm(self.first), lambda factor: factor.norms())

    def top(self, k: int) -> Top:
        """The k terms of largest norm at every position: `value` and `index`, `[k,B,T]`."""
        return top(self.norms(), k)

    def to_table(self, k: int | None = None) -> Table:
        """The norms: one row for each term, row and position; or the k largest of each position.

        A `Table` is a dict of columns: term, layer, kind, index, source, row, position (an index
        of the result's T axis), norm.
        """
        axes = ("row", "position")[-(self.first.ndim - 2) :]
        return table_of_largest(self.norms(), self.labels, axes, k, "norm")

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
        return self._assemble(self.first, lambda factor: factor.expand())

    def _assemble(self, first: Array, of: Callable[[Any], Array]) -> Array:
        """`[n,...]` and a function `[m,...]` of every layer's factors, as `[C,...]`."""
        layered = [
            tuple(Measured(jax.lax.map(of, factor), factor.kind) for factor in factors)
            for factors in self.layered
        ]
        return assembled(first, layered, self.labels)


def assembled(first: Array, layered: list[tuple[Measured, ...]], labels: Labels) -> Array:
    """Joins `[n,...]` and per segment and kind `[L,m,...]` into `[C,...]`, in writing order."""
    joined = []
    for found in layered:
        values = [each.value for each in found]
        layers = max((value.shape[0] for value in values), default=0)
        # What the last layer has not written yet at resid_mid: zeros, cut off below.
        padded = [jnp.pad(v, [(0, layers - v.shape[0])] + [(0, 0)] * (v.ndim - 1)) for v in values]
        if padded:
            terms = jnp.concatenate(padded, axis=1)
            joined.append(terms.reshape(-1, *terms.shape[2:]))
    if not joined:
        return first
    rest = jnp.concatenate(joined)[labels.skipped :]
    return jnp.concatenate([first, rest])[: len(labels)]


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
            e * F + n, those of the shared expert follow, and mlp_bias counts experts),
            "expert" (embed, pos, attn, expert, shared_expert; mlp in layers without experts) or
            "source" (as "head", with each head split into what it read from each position:
            `pattern[t,s] v_s w_o`; `label.source` is the column s of `tokens`).
            Kinds that the model does not have are left out; norm_bias is added where there is
            one. A model whose stream is rounded (`stream_dtype`) also has attn_rounding and
            mlp_rounding, and needs a stream captured with resid_pre, attn_out, resid_mid, mlp_out
            and final besides.
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
    options = {
        "span": Span(checked_point(at, config)),
        "by": by,
        "layers": checked_layers(layers, config.n_layers),
        "kinds": checked_kinds(kinds),
    }
    stream = stream_of(residuals, mask)
    if stream is not None:
        stream.need("mask", all_positions=by in WHOLE)
        positions = checked_positions(positions, stream.mask.shape, stream.mask)
        return _decompose(model, stream, positions=positions, **options)
    tokens, mask = checked_tokens(config, residuals, mask, name="residuals")
    positions = checked_positions(positions, tokens.shape, mask)
    return _run_and_decompose(model, tokens, mask, positions=positions, **options)


@compiled("positions", "span", "by", "layers", "kinds")
def _decompose(model, stream, *, positions, span, by, layers, kinds):
    here = located(stream, positions, by)
    return Decomposition(*terms(model, *here, span, by=by, layers=layers, kinds=kinds))


@compiled("positions", "span", "by", "layers", "kinds")
def _run_and_decompose(model, tokens, mask, *, positions, span, by, layers, kinds):
    stream = captured(model, tokens, mask, by, kinds=kinds, layers=layers, positions=positions)
    here = located(stream, positions, by)
    return Decomposition(*terms(model, *here, span, by=by, layers=layers, kinds=kinds))


def captured(
    model: Transformer,
    tokens: Array,
    mask: Array | None,
    by: str,
    *,
    kinds: Kinds = None,
    layers: tuple[int, ...] | None = None,
    positions: tuple[int, ...] | None = None,
    also: tuple[str, ...] = (),
) -> ResidualStream:
    """Runs the model, and keeps what terms need, at these layers and positions.

    Values by source are kept at all positions.
    """
    config = model.config
    every = config.stream_dtype is not None or config.norms_stream
    fields = (*fields_for(config, by, kinds), *also)
    capture = Capture(fields, layers=None if every or not layers else layers, positions=positions)
    return model.after_embedding(
        model.embed(tokens, mask=mask), mask=mask, capture=capture, whole=WHOLE.get(by, ())
    ).residuals


def checked_point(at: Any, config: ModelConfig, name: str = "at") -> tuple[int, int]:
    """How many layers' attention and MLP are written before the point `at`."""
    n_layers = config.n_layers
    if at == "final":
        return n_layers, n_layers
    if not (isinstance(at, tuple) and len(at) == 2 and at[0] in POINTS):
        must, do = f"'final' or ({POINTS}, layer)", "such as ('resid_post', 3)"
        raise ValueError(expected(name, must, repr(at), do))
    if config.parallel and at[0] == "resid_mid":
        do = "attention and MLP of a parallel block write at once; use resid_post"
        raise ValueError(expected(name, "a point that the model has", repr(at), do))
    layer = checked_layer(at[1], n_layers, name="layer")
    if not isinstance(layer, int):
        do = "the number of terms depends on it; use residual_decomposition for a traced layer"
        raise TypeError(expected("layer", "an int", "a traced value", do))
    return layer + (at[0] != "resid_pre"), layer + (at[0] == "resid_post")


def located(
    stream: ResidualStream, positions: tuple[int, ...] | None, by: str
) -> tuple[ResidualStream, Int[Array, "... T"]]:
    """The stream at these positions, and how many real tokens stand before each of them."""
    stream.need("mask")
    places = Places.of(stream.mask.shape, stream.mask)
    positions = stream.positions if positions is None else positions
    if positions is None:
        return stream, places.position
    return stream.at(positions, whole=WHOLE.get(by, ())), places.number(jnp.array(positions, int))
