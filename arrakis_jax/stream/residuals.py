"""The residual stream of a forward, as a plain pytree."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.errors import NotCapturedError, expected
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.stream.capture import DEFAULT_CAPTURE
from arrakis_jax.stream.fields import FIELDS, INPUT_FIELDS, SCALES, UNSTACKED
from arrakis_jax.stream.padding import Padding, select_positions


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Routing(Record):
    """Where a mixture-of-experts layer sends each token.

    Attributes:
        index: `[L,B,T,k]`, the token's experts, the one of largest weight first; 0 at padding.
        weight: `[L,B,T,k]`, the factor on each expert's output.
        shared: `[L,B,T]`, the factor on the shared expert's output; None without one.
    """

    index: Int[Array, "L B T k"]
    weight: Float[Array, "L B T k"]
    shared: Float[Array, "L B T"] = ABSENT


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class ResidualStream(Record):
    """The residual stream of one forward pass, as a plain pytree.

    At every layer `resid_mid = resid_pre + attn_out` and `resid_post = resid_mid + mlp_out`. A
    parallel block has no resid_mid: there `resid_post = resid_pre + attn_out + mlp_out`. Where
    norms are applied to the stream itself, see `decompose`.

    At padding everything is zero, except norm scales, which are one. A field that was not captured
    is None. The leading axis L runs over `layers` (all if that is None), the axis T over
    `positions` (counted in real tokens; all if None). In a model with several segments of layers
    (some with experts, some without), `mlp_act`, `shared_act`, `router` and `routing` are tuples:
    one entry for each segment, with that segment's layers.

    Attributes:
        embed: `[B,T,D]`, token embedding plus learned position embedding.
        resid_pre: `[L,B,T,D]`, the stream entering each block.
        attn_out: `[L,B,T,D]`, what attention writes to the stream, with the output bias, the norm
            of the output and multipliers.
        resid_mid: `[L,B,T,D]`, the stream between attention and MLP; None in parallel blocks.
        mlp_out: `[L,B,T,D]`, what the MLP writes; None in attention-only models.
        final: `[B,T,D]`, the stream before the final norm.
        norm_attn_scale: `[L,B,T]`, the divisor of the norm before attention (or of the stream).
        norm_attn_out_scale: `[L,B,T]`, the divisor of the norm of attention's output.
        norm_mlp_scale: `[L,B,T]`, the divisor of the norm before the MLP (or of the stream).
        norm_mlp_out_scale: `[L,B,T]`, the divisor of the norm of the MLP's output.
        norm_q_scale: `[L,B,T,H]` (or `[L,B,T]` over all heads), the divisor of queries.
        norm_k_scale: `[L,B,T,G]` (or `[L,B,T]`), the divisor of keys.
        norm_final_scale: `[B,T]`, the divisor of the final norm.
        q: `[L,B,T,H,K]`, queries, after their norm and RoPE.
        k: `[L,B,T,G,K]`, keys, after their norm and RoPE.
        v: `[L,B,T,G,K]`, values.
        pattern: `[L,B,H,T,S]`, attention probabilities; with attention sinks a row sums to less
            than one.
        z: `[L,B,T,H,K]`, attention-weighted values of each head.
        mlp_act: `[L,B,T,F]`, the MLP's activations, which multiply `w_out`; with experts
            `[L,B,T,k,F]`.
        shared_act: `[L,B,T,F]`, the shared expert's activations.
        router: `[L,B,T,E]`, the router's scores before softmax.
        routing: the experts of each token and their weights.
        tokens: `[B,T]`, the token ids.
        mask: `[B,T]` bool, True at real tokens.
        layers: the layers held, ascending, or None for all.
        positions: the positions held, or None for all.
        lacks: the fields that the model does not have, such as an MLP's.
        normed: whether norms are applied to the stream itself, which then is not a plain sum.
        edited: the sites where an edit changed the forward.
    """

    embed: Float[Array, "B T D"] = ABSENT
    resid_pre: Float[Array, "L B T D"] = ABSENT
    attn_out: Float[Array, "L B T D"] = ABSENT
    resid_mid: Float[Array, "L B T D"] = ABSENT
    mlp_out: Float[Array, "L B T D"] = ABSENT
    final: Float[Array, "B T D"] = ABSENT
    norm_attn_scale: Float[Array, "L B T"] = ABSENT
    norm_attn_out_scale: Float[Array, "L B T"] = ABSENT
    norm_mlp_scale: Float[Array, "L B T"] = ABSENT
    norm_mlp_out_scale: Float[Array, "L B T"] = ABSENT
    norm_q_scale: Float[Array, "L B T H"] = ABSENT
    norm_k_scale: Float[Array, "L B T G"] = ABSENT
    norm_final_scale: Float[Array, "B T"] = ABSENT
    q: Float[Array, "L B T H K"] = ABSENT
    k: Float[Array, "L B T G K"] = ABSENT
    v: Float[Array, "L B T G K"] = ABSENT
    pattern: Float[Array, "L B H T S"] = ABSENT
    z: Float[Array, "L B T H K"] = ABSENT
    mlp_act: Float[Array, "L B T F"] | tuple[Array, ...] = ABSENT
    shared_act: Float[Array, "L B T F"] | tuple[Array | None, ...] = ABSENT
    router: Float[Array, "L B T E"] | tuple[Array | None, ...] = ABSENT
    routing: Routing | tuple[Routing | None, ...] = ABSENT
    tokens: Int[Array, "B T"] = ABSENT
    mask: Bool[Array, "B T"] = ABSENT
    layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    positions: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    lacks: tuple[str, ...] = field(default=(), metadata={"static": True})
    normed: bool = field(default=False, metadata={"static": True})
    edited: tuple[str, ...] = field(default=(), metadata={"static": True})

    @property
    def resid_post(self) -> Float[Array, "L B T D"]:
        """`[L,B,T,D]`, the stream leaving each block: the next `resid_pre`, or `final`."""
        self.need("resid_pre", "final", all_layers=True)
        return jnp.concatenate([self.resid_pre[1:], self.final[None]])

    def of_layer(self, name: str, layer: int) -> Array:
        """A field `[B,T,...]` of one layer, counted from 0."""
        if self.layers is not None and layer not in self.layers:
            self.need(all_layers=True)
        row = layer if self.layers is None else self.layers.index(layer)
        return getattr(self, name)[row]

    def need(self, *names: str, all_layers: bool = False, all_positions: bool = False) -> None:
        """Raises NotCapturedError unless every named field is captured, for all layers if asked.

        A field that the model itself does not have is not missing.
        """
        missing = [n for n in names if getattr(self, n) is None and n not in self.lacks]
        if missing:
            usual = "'residuals' or " if set(names) <= set(DEFAULT_CAPTURE.fields) else ""
            raise NotCapturedError(
                f"`residuals` must be captured with {missing}, got a stream without; "
                f"run the model with capture={tuple(names)!r}, or {usual}'all'"
            )
        for axis, wanted in (("layers", all_layers), ("positions", all_positions)):
            captured = getattr(self, axis)
            if wanted and captured is not None:
                raise NotCapturedError(
                    f"`residuals` must be captured at all {axis}, got only {captured}; "
                    f"run the model with {axis}=None in its Capture"
                )

    def need_unedited(self, sites: tuple[str, ...], reader: str, do: str) -> None:
        """Raises ValueError if an edit changed one of these sites; `reader` is what needs them."""
        changed = tuple(site for site in sites if site in self.edited)
        if changed:
            must = f"of a forward without edits of {', '.join(changed)} for {reader}"
            got = f"one with edits of {', '.join(self.edited)}"
            raise ValueError(expected("residuals", must, got, do))

    def at(
        self, positions: Int[Array, "... N"] | tuple[int, ...], *, whole: tuple[str, ...] = ()
    ) -> "ResidualStream":
        """The stream at these positions, counted in real tokens; zero where a row has none.

        Every field has N in place of T, `tokens` and `mask` too, except the fields named in
        `whole`. Works with or without a batch.
        """
        self.need("mask")
        static = positions if isinstance(positions, tuple) else None
        wanted = jnp.asarray(positions, int)
        index, valid = Padding.of(self.mask.shape, self.mask).columns(wanted)
        column = index
        if self.positions is not None:
            if static is None or not set(static) <= set(self.positions):
                raise NotCapturedError(
                    f"`position` must be one of those captured, {self.positions}, got "
                    f"{positions}; run the model with positions=None in its Capture"
                )
            # The fields hold some positions, so a position's place is its place among those.
            chosen = jnp.array([self.positions.index(p) for p in static], int)
            column = jnp.broadcast_to(chosen, index.shape)
        picked = self.picked(column, valid, whole=whole)
        if self.tokens is not None:  # of all columns, whichever positions the fields hold
            picked = replace(picked, tokens=jnp.take_along_axis(self.tokens, index, -1))
        return picked

    def picked(
        self,
        index: Int[Array, "... N"],
        valid: Bool[Array, "... N"],
        *,
        whole: tuple[str, ...] = (),
        stacked: bool = True,
    ) -> "ResidualStream":
        """The stream at these indices of the T axis, where valid; without `tokens`.

        `stacked=False`: the fields of one layer have no L axis.
        """

        def pick(name: str, axis: int, value: Array) -> Array:
            return select_positions(
                value,
                index,
                valid,
                axis,
                batch_axis=int(stacked and name not in UNSTACKED),
                absent=int(name in SCALES),
            )

        n_batch_axes = self.mask.ndim - 1
        fields: dict[str, Any] = {}
        for name in FIELDS:
            value = getattr(self, name)
            if value is not None and name not in whole:
                # `pattern [L,B,H,T,S]` has its heads before T.
                axis = (stacked and name not in UNSTACKED) + n_batch_axes + (name == "pattern")
                value = jax.tree.map(partial(pick, name, axis), value)
            fields[name] = value
        return replace(self, **fields, tokens=None, mask=valid, positions=None)

    def batch_axes(self) -> "ResidualStream":
        """The `in_axes` for `jax.vmap` over the examples of the batch, as a pytree."""
        axes: dict[str, Any] = {
            name: jax.tree.map(
                lambda _, n=name: 0 if n in (*UNSTACKED, *INPUT_FIELDS) else 1, value
            )
            for name in (*FIELDS, *INPUT_FIELDS)
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **axes)

    def example(self, b: int) -> "ResidualStream":
        """The stream of example `b`, without the batch axis: what vmap hands to its function."""
        self.need("mask")
        n = self.mask.shape[0]
        if not isinstance(b, Tracer) and not -n <= b < n:
            raise IndexError(expected("b", f"in [{-n}, {n})", b, f"the batch has {n} examples"))
        return jax.tree.map(lambda x, axis: jnp.take(x, b, axis), self, self.batch_axes())


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ModelOutput(Record):
    """What a forward returns: `logits [B,T,V]` (None if not captured) and the residual stream."""

    logits: Float[Array, "B T V"]
    residuals: ResidualStream
