"""The stream at one point as the sum of everything written before it, kept as factors."""

from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
from arrakis_jax.errors import expected
from arrakis_jax.forward import compiled, stream_of
from arrakis_jax.labels import Labels
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import contract, norm
from arrakis_jax.places import Places
from arrakis_jax.residuals import Capture, ModelOutput, Record, ResidualStream

BY = ("component", "head")
POINTS = ("resid_pre", "resid_mid", "resid_post")
_CAPTURE = {"component": ("embed", "attn_out", "mlp_out"), "head": ("embed", "z", "mlp_out")}


def capture_for(by: str) -> tuple[str, ...]:
    """The fields that `decompose` and `logit_attribution` need of a stream, for `run`."""
    checked_choice("by", by, BY)
    return (*_CAPTURE[by], "final", "norm_final_scale")


class Top(NamedTuple):
    """The largest terms: their `value [k,B,T]`, and their `index [k,B,T]` in the labels."""

    value: Array
    index: Array


def fields_for(model: Transformer, by: str) -> tuple[str, ...]:
    """The fields that the terms of this model need: with a rounded stream, what was rounded too."""
    rounded = ("resid_pre", "attn_out", "resid_mid", "final")
    names = (*_CAPTURE[by], *(rounded if model.config.stream_dtype else ()))
    return tuple(dict.fromkeys(names))  # each once, in this order


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Decomposition(Record):
    """The terms of a sum, in the order in which the model writes them, as factors.

    A vector term is held as it is, a head's as `z` and the model's `w_o`: nothing is expanded
    until asked for. Everything is zero at padding.

    Attributes:
        first: `[n,B,T,D]`, the terms before the layers (embed, pos).
        layered: per kind, its `coefficient` and its `direction` (None: the vector itself).
        labels: what each of the C terms is.
    """

    first: Float[Array, "n B T D"]
    layered: tuple["Factor", ...]
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
        return self._assemble(first, [f.project(directions) for f in self.layered])

    def along(self, direction: Float[Array, "B T D"]) -> Float[Array, "C B T"]:
        """Each term's inner product with one direction per position."""
        first = contract("C...D,...D->C...", self.first, direction)
        return self._assemble(first, [f.along(direction) for f in self.layered])

    def norms(self) -> Float[Array, "C B T"]:
        """Each term's Euclidean norm, without expanding any term."""
        first = norm(self.first)
        return self._assemble(first, [f.norms() for f in self.layered])

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
        return self._assemble(self.first, [f.expand() for f in self.layered])

    def _assemble(self, first: Array, layered: list[Array]) -> Array:
        """Joins `[n,...]` and per kind `[L,m,...]` into `[C,...]`, in writing order."""
        if not layered:
            return first
        layers = max(values.shape[0] for values in layered)
        # The last layer's MLP is not written yet at resid_mid: zeros, cut off below.
        padded = [jnp.pad(v, [(0, layers - v.shape[0])] + [(0, 0)] * (v.ndim - 1)) for v in layered]
        joined = jnp.concatenate(padded, axis=1)
        joined = joined.reshape(-1, *joined.shape[2:])
        return jnp.concatenate([first, joined])[: len(self.labels)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Factor(Record):
    """The terms of one kind in every layer.

    Attributes:
        coefficient: a vector's `[L,B,T,D]`, or the heads' `z [L,B,T,H,K]`.
        direction: None, or the heads' `w_o [L,H,K,D]`.
    """

    coefficient: Array
    direction: Array | None = None

    def project(self, directions: Float[Array, "N D"]) -> Float[Array, "L m B T N"]:
        """Inner products with directions."""
        if self.direction is None:
            return contract("L...D,ND->L...N", self.coefficient, directions)[:, None]
        w_LNHK = contract("LHKD,ND->LNHK", self.direction, directions)
        return contract("L...HK,LNHK->LH...N", self.coefficient, w_LNHK)

    def along(self, direction: Float[Array, "B T D"]) -> Float[Array, "L m B T"]:
        """Inner products with one direction per position."""
        if self.direction is None:
            return contract("L...D,...D->L...", self.coefficient, direction)[:, None]

        def heads(layer: tuple[Array, Array]) -> Array:
            z, w_o_HKD = layer
            return contract("...HK,...HK->H...", z, contract("HKD,...D->...HK", w_o_HKD, direction))

        return jax.lax.map(heads, (self.coefficient, self.direction))

    def norms(self) -> Float[Array, "L m B T"]:
        """Euclidean norms."""
        if self.direction is None:
            return norm(self.coefficient)[:, None]
        # |z W| = |z R^T| with W^T = Q R: exact, in K dimensions in place of D.
        acc = jnp.promote_types(self.direction.dtype, jnp.float32)
        r_LHJK = jnp.linalg.qr(jnp.swapaxes(self.direction, -1, -2).astype(acc), mode="r")
        return norm(contract("L...HK,LHJK->LH...J", self.coefficient, r_LHJK))

    def expand(self) -> Float[Array, "L m B T D"]:
        """The vectors."""
        if self.direction is None:
            return self.coefficient[:, None]
        return contract("L...HK,LHKD->LH...D", self.coefficient, self.direction)


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

    `x = embed + pos + sum_l (attn_l + mlp_l)`, with `attn_l = sum_h z_lh w_o[l,h] + b_o[l]`.
    The terms sum to the stream at `at` (if no layers are left out). Nothing is folded into
    weights and no norm is involved; a head's term includes its value bias. What an edit of the
    stream itself (resid_pre, resid_mid, resid_post, final) adds is no term: the sum then lacks it.

    Args:
        model: the transformer.
        residuals: a captured stream (`capture_for(by)` names the fields), or token ids `[B,T]`,
            which are then run.
        at: "final", or `("resid_pre" | "resid_mid" | "resid_post", layer)`.
        layer: `layer=n` is short for `at=("resid_post", n)`.
        by: "component" (kinds embed, pos, attn, mlp) or "head" (embed, pos, head, attn_bias,
            mlp); kinds that the model does not have are left out. A model whose stream is rounded
            (`stream_dtype`) also has attn_rounding and mlp_rounding, and needs a stream captured
            with resid_pre, attn_out, resid_mid and final besides.
        layers: list the terms of these layers only; their sum is then not the stream.
        positions: these positions only, counted in real tokens (T in the result is their number).
        mask: `[B,T]`, with token ids.

    Returns:
        A Decomposition of C terms.

    Raises:
        NotCapturedError: if the stream lacks a field, a layer or a position that this needs.

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
    checked_choice("by", by, BY)
    config = model.config
    if layer is not None:
        if at != "final":
            do = "give one of them"
            raise ValueError(expected("at", "'final' when layer is given", repr(at), do))
        at = ("resid_post", layer)
    ends = checked_point(at, config.n_layers)
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
    capture = Capture(fields_for(model, by), positions=positions)
    stream = model(tokens, mask=mask, capture=capture).residuals
    return factors(model, *located(stream, positions), ends=ends, by=by, layers=layers)


def checked_point(at: Any, n_layers: int) -> tuple[int, int]:
    """How many layers' attention and MLP are written before the point `at`."""
    if at == "final":
        return n_layers, n_layers
    if not (isinstance(at, tuple) and len(at) == 2 and at[0] in POINTS):
        must, do = f"'final' or ({POINTS}, layer)", "such as ('resid_post', 3)"
        raise ValueError(expected("at", must, repr(at), do))
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
    config = model.config
    rounded = config.stream_dtype is not None
    stream.need(*fields_for(model, by), all_layers=rounded)
    wanted = tuple(range(ends[0])) if layers is None else tuple(i for i in layers if i < ends[0])
    rows = _rows(stream, wanted)
    real = stream.mask[..., None]

    names, first = ("embed",), stream.embed[None].astype(config.acc)
    if model.w_pos is not None:
        pos = jnp.where(real, model.embed_positions(position), 0)
        names, first = ("embed", "pos"), jnp.stack([stream.embed - pos, pos])
    if by == "component":
        kinds, parts = [("attn", 0)], [Factor(stream.attn_out[rows])]
    else:
        attn = model.blocks.attn
        kinds, parts = [("head", config.n_heads)], [Factor(stream.z[rows], attn.w_o[...][rows])]
        if attn.b_o is not None:
            bias = attn.b_o[...][rows].astype(config.acc)
            bias = bias.reshape(-1, *(1,) * stream.mask.ndim, config.d_model)
            kinds, parts = (
                [*kinds, ("attn_bias", 0)],
                [*parts, Factor(jnp.where(real[None], bias, 0))],
            )
    if rounded:
        after = stream.resid_mid[rows].astype(config.acc)
        rounding = after - stream.resid_pre[rows] - stream.attn_out[rows]
        kinds, parts = [*kinds, ("attn_rounding", 0)], [*parts, Factor(rounding)]
    n_mlp = sum(i < ends[1] for i in wanted) if config.d_mlp else len(wanted)
    n_after = len(kinds)
    if config.d_mlp:
        kinds, parts = [*kinds, ("mlp", 0)], [*parts, Factor(stream.mlp_out[rows][:n_mlp])]
    if config.d_mlp and rounded:
        after = stream.resid_post[rows][:n_mlp].astype(config.acc)
        rounding = after - stream.resid_mid[rows][:n_mlp] - stream.mlp_out[rows][:n_mlp]
        kinds, parts = [*kinds, ("mlp_rounding", 0)], [*parts, Factor(rounding)]
    dropped = (len(wanted) - n_mlp) * (len(kinds) - n_after)
    labels = Labels(names, wanted, tuple(kinds), dropped=dropped)
    return Decomposition(first=first, layered=tuple(parts), labels=labels)


def _rows(stream: ResidualStream, wanted: tuple[int, ...]) -> slice | np.ndarray:
    """Where these layers stand on the L axis of a stream."""
    if stream.layers is None:
        every = wanted == tuple(range(len(wanted)))
        return slice(len(wanted)) if every else np.array(wanted, int)
    if not set(wanted) <= set(stream.layers):
        stream.need(all_layers=True)
    return np.array([stream.layers.index(i) for i in wanted], int)
