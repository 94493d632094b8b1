"""The pytrees that everything speaks: the residual stream, what to capture of it, and edits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from arrakis_jax.axes import Array, Bool, Float, Int
from arrakis_jax.config import ModelConfig
from arrakis_jax.errors import NotCapturedError, expected
from arrakis_jax.places import Places

# Fields without an L axis; the others have it first.
UNSTACKED = ("embed", "final", "norm_final_scale")
ABOUT = ("tokens", "mask")
STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "final")
SCALES = (
    "norm_attn_scale", "norm_attn_out_scale", "norm_mlp_scale", "norm_mlp_out_scale",
    "norm_q_scale", "norm_k_scale", "norm_final_scale",
)  # fmt: skip
MLP_FIELDS = ("mlp_out", "mlp_act", "norm_mlp_scale", "norm_mlp_out_scale")
MOE_FIELDS = ("shared_act", "router", "routing")
INTERNAL = ("q", "k", "v", "pattern", "z", "mlp_act", "shared_act", "router")
FIELDS = (*STREAM, *SCALES, *INTERNAL, "routing")
# Fields that segments of layers may have or not, or in other shapes: then a tuple, one for each.
SEGMENTED = ("mlp_act", *MOE_FIELDS)
# What one reader of the stream reads, before its norm: sites of edits, at which every query, key
# and value head, and the MLP, has an input of its own.
READERS = ("q_in", "k_in", "v_in", "mlp_in")
# The sites whose values together are the field "routing".
ROUTING_SITES = {"index": "routing_index", "weight": "routing_weight", "shared": "shared_gate"}


class Record:
    """A dataclass that prints the shapes of its arrays, and not their values."""

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # pyright: ignore
        shown = (f"{name}={_shown(value)}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and any(
        isinstance(v, Record) or hasattr(v, "shape") for v in value
    ):
        return f"({', '.join(map(_shown, value))})"
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"{getattr(value, 'dtype', '')}{list(shape)}"


ABSENT: Any = None  # the default of a field, which has an array's type: `need` guards its use


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Routing(Record):
    """Where a mixture-of-experts layer sends each token.

    Attributes:
        index: `[L,B,T,k]`, its experts, those of larger weight first; 0 at padding.
        weight: `[L,B,T,k]`, what each expert's output is multiplied by.
        shared: `[L,B,T]`, what the shared expert's output is multiplied by; None without one.
    """

    index: Int[Array, "L B T k"]
    weight: Float[Array, "L B T k"]
    shared: Float[Array, "L B T"] = ABSENT


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class ResidualStream(Record):
    """The residual stream of one forward pass, as a plain pytree.

    At every layer `resid_mid = resid_pre + attn_out` and `resid_post = resid_mid + mlp_out` (in a
    parallel block, which has no resid_mid, `resid_post = resid_pre + attn_out + mlp_out`; where
    norms are applied to the stream itself see `decompose`).
    Everything is zero at padding, except norm scales, which are one there. A field that was not
    captured is None. The leading axis L runs over `layers` (all of them when that is None), the
    axis T over `positions` (counted in real tokens; all when None). In a model with several
    segments of layers (some with experts, some without), `mlp_act`, `shared_act`, `router` and
    `routing` are tuples, one entry a segment, each with its own layers.

    Attributes:
        embed: `[B,T,D]`, token embedding plus learned position embedding.
        resid_pre: `[L,B,T,D]`, the stream entering each block.
        attn_out: `[L,B,T,D]`, what attention writes to the stream: output bias, norms of the
            output and multipliers included.
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
        mlp_act: `[L,B,T,F]`, what multiplies `w_out`; with experts `[L,B,T,k,F]`.
        shared_act: `[L,B,T,F]`, what multiplies the shared expert's `w_out`.
        router: `[L,B,T,E]`, the router's scores before softmax.
        routing: the experts of each token and their weights.
        tokens: `[B,T]`, the token ids.
        mask: `[B,T]` bool, True at real tokens.
        layers: the layers held, ascending, or None for all.
        positions: the positions held, or None for all.
        lacks: the fields that the model itself does not have, such as an MLP's.
        normed: whether norms are applied to the stream itself, which then is no plain sum.
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

    @property
    def resid_post(self) -> Float[Array, "L B T D"]:
        """`[L,B,T,D]`, the stream leaving each block: the next `resid_pre`, and `final` last."""
        self.need("resid_pre", "final", all_layers=True)
        return jnp.concatenate([self.resid_pre[1:], self.final[None]])

    def need(self, *names: str, all_layers: bool = False, all_positions: bool = False) -> None:
        """Raises NotCapturedError unless every named field is here, for all layers if asked."""
        missing = [n for n in names if getattr(self, n) is None and n not in self.lacks]
        if missing:
            usual = "'residuals' or " if set(names) <= set(DEFAULT_CAPTURE.fields) else ""
            raise NotCapturedError(
                f"`residuals` must be captured with {missing}, got a stream without; "
                f"run the model with capture={tuple(names)!r}, or {usual}'all'"
            )
        for what, wanted in (("layers", all_layers), ("positions", all_positions)):
            held = getattr(self, what)
            if wanted and held is not None:
                raise NotCapturedError(
                    f"`residuals` must be captured at all {what}, got only {held}; "
                    f"run the model with {what}=None in its Capture"
                )

    def at(
        self, positions: Int[Array, "... N"] | tuple[int, ...], *, whole: tuple[str, ...] = ()
    ) -> "ResidualStream":
        """The stream at these positions, counted in real tokens; zero where a row has none.

        Every field but those named in `whole` has N in place of T, `tokens` and `mask` too. Works
        with or without a batch.
        """
        self.need("mask")
        static = positions if isinstance(positions, tuple) else None
        wanted = jnp.asarray(positions, int)
        index, valid = Places.of(self.mask.shape, self.mask).find(wanted)
        column = index
        if self.positions is not None:
            if static is None or not set(static) <= set(self.positions):
                raise NotCapturedError(
                    f"`position` must be one of those captured, {self.positions}, got "
                    f"{positions}; run the model with positions=None in its Capture"
                )
            chosen = jnp.array([self.positions.index(p) for p in static], int)
            column = jnp.broadcast_to(chosen, index.shape)
        picked = self.picked(column, valid, whole=whole)
        if self.tokens is not None:
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

        kept = {name: getattr(self, name) for name in whole}
        about: dict[str, Any] = {n: getattr(self, n) for n in ("layers", "lacks", "normed")}
        fields = replace(self, **dict.fromkeys(whole))._each(pick, stacked)
        return ResidualStream(**fields, **kept, mask=valid, **about)

    def _each(
        self, change: Callable[[str, int, Array], Array], stacked: bool = True
    ) -> dict[str, Any]:
        """Every captured field, its arrays changed by a function of its name and T axis."""
        before = self.mask.ndim - 1  # the axes between L and T
        return {
            name: jax.tree.map(
                partial(
                    change,
                    name,
                    (stacked and name not in UNSTACKED) + before + (name == "pattern"),
                ),
                value,
            )
            for name in FIELDS
            if (value := getattr(self, name)) is not None
        }

    def squeezed(self) -> "ResidualStream":
        """A stream at one position, without the position axis."""
        values = self._each(lambda _, axis, value: jnp.squeeze(value, axis))
        if self.tokens is not None:
            values["tokens"] = self.tokens[..., 0]
        return replace(self, **values, mask=self.mask[..., 0], positions=None)

    def batch_axes(self) -> "ResidualStream":
        """The `in_axes` pytree with which `jax.vmap` maps over the examples of the batch."""
        axes: dict[str, Any] = {
            name: jax.tree.map(lambda _, n=name: 0 if n in (*UNSTACKED, *ABOUT) else 1, value)
            for name in (*FIELDS, *ABOUT)
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


@dataclass(frozen=True)
class Capture:
    """What a forward returns, selected inside it.

    Attributes:
        fields: names of ResidualStream fields, and "logits".
        layers: the layers to keep, or None for all; negative ones count from the end.
        positions: the positions to keep, counted in real tokens, or None for all; -1 is each
            row's last real token. Logits are kept at the same positions.
    """

    fields: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self):
        if isinstance(self.fields, str) or not isinstance(self.fields, Iterable):
            do = f"write ({self.fields!r},) for one"
            raise TypeError(expected("fields", "a tuple of names", repr(self.fields), do))
        object.__setattr__(self, "fields", tuple(self.fields))  # a list would not hash
        for name in ("layers", "positions"):
            object.__setattr__(self, name, as_tuple(name, getattr(self, name)))
        unknown = [name for name in self.fields if name not in (*FIELDS, "logits")]
        if unknown:
            do = "name such fields"
            if "resid_post" in unknown:
                do = "resid_post is read from 'resid_pre' and 'final': name these"
            raise ValueError(expected("capture", f"made of {(*FIELDS, 'logits')}", unknown, do))


def as_tuple(name: str, values: Any) -> tuple[int, ...] | None:
    """A tuple of ints from any concrete integers; None for None, TypeError for anything else."""
    if values is None:
        return None
    array = None if isinstance(values, Tracer) else _integers(values)
    if array is None:
        do = "they decide the result's shape, so they must be known before tracing"
        raise TypeError(expected(name, "a tuple of integers, or None", repr(values), do))
    return tuple(array.tolist())


def _integers(values: Any) -> np.ndarray | None:
    try:
        array = np.array(values if isinstance(values, np.ndarray) else list(values))
    except (TypeError, ValueError):  # no sequence, or one of traced or unequal things
        return None
    if array.ndim == 1 and (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        return array.astype(int)
    return None


def lacking(config: ModelConfig) -> tuple[str, ...]:
    """The fields of a residual stream that a model of this config does not have."""
    place = config.norm_placement
    has_mlp = config.d_mlp > 0 or config.n_experts > 0
    rules = (
        (MLP_FIELDS, has_mlp),
        (MOE_FIELDS, config.n_experts > 0),
        (("shared_act",), config.d_shared_expert > 0),
        (("resid_mid",), not config.parallel),
        (SCALES, config.norm is not None),
        (("norm_attn_scale", "norm_mlp_scale"), place != "post"),
        (("norm_mlp_scale",), not config.shared_norm),
        (("norm_attn_out_scale", "norm_mlp_out_scale"), place in ("post", "both")),
        (("norm_q_scale", "norm_k_scale"), config.qk_norm is not None),
        (("norm_final_scale",), config.final_norm),
    )
    absent = {name for names, present in rules if not present for name in names}
    return tuple(name for name in FIELDS if name in absent)


DEFAULT_CAPTURE = Capture(("logits", *STREAM, *SCALES))
CAPTURES = {"residuals": DEFAULT_CAPTURE, "all": Capture(("logits", *FIELDS))}


def as_capture(capture: "str | tuple[str, ...] | Capture") -> Capture:
    """Any accepted spelling of a capture, as a Capture."""
    if isinstance(capture, Capture):
        return capture
    if isinstance(capture, str):
        if capture not in CAPTURES:
            do = f"for one field write ({capture!r},)"
            raise ValueError(expected("capture", f"one of {tuple(CAPTURES)}", repr(capture), do))
        return CAPTURES[capture]
    if not isinstance(capture, Iterable):
        must, do = "'residuals', 'all', field names or a Capture", "name what to keep"
        raise TypeError(expected("capture", must, repr(capture), do))
    return Capture(tuple(capture))


def select_positions(
    value: Array,
    index: Int[Array, "... N"] | None,
    valid: Bool[Array, "... N"] | None,
    axis: int,
    *,
    batch_axis: int = 0,
    absent: float = 0,
) -> Array:
    """`value` at these indices of its T axis, `absent` where a row has no such position."""
    if index is None or valid is None:
        return value
    shape = [1] * value.ndim
    shape[batch_axis : batch_axis + index.ndim - 1] = index.shape[:-1]
    shape[axis] = index.shape[-1]
    picked = jnp.take_along_axis(value, index.reshape(shape), axis)
    return jnp.where(valid.reshape(shape), picked, absent)
