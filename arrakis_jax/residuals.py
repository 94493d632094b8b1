"""The pytrees that everything speaks: the residual stream, what to capture of it, and edits."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
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
STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "final")
SCALES = ("norm_attn_scale", "norm_mlp_scale", "norm_final_scale")
INTERNAL = ("q", "k", "v", "pattern", "z", "mlp_act")
FIELDS = STREAM + SCALES + INTERNAL
# How many axes each field has from T on; 2 unless named.
TRAILING = {"q": 3, "k": 3, "v": 3, "z": 3} | dict.fromkeys(SCALES, 1)


class Record:
    """A dataclass that prints the shapes of its arrays, and not their values."""

    def __repr__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # pyright: ignore
        shown = (f"{name}={_shown(value)}" for name, value in values.items() if value is not None)
        return f"{type(self).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and any(isinstance(item, Record) for item in value):
        return f"({', '.join(map(repr, value))})"
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else f"{getattr(value, 'dtype', '')}{list(shape)}"


ABSENT: Any = None  # the default of a field, which has an array's type: `need` guards its use


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class ResidualStream(Record):
    """The residual stream of one forward pass, as a plain pytree.

    At every layer `resid_mid = resid_pre + attn_out` and `resid_post = resid_mid + mlp_out`.
    Everything is zero at padding, except norm scales, which are one there. A field that was not
    captured is None. The leading axis L runs over `layers` (all of them when that is None), the
    axis T over `positions` (counted in real tokens; all when None).

    Attributes:
        embed: `[B,T,D]`, token embedding plus learned position embedding.
        resid_pre: `[L,B,T,D]`, the stream entering each block.
        attn_out: `[L,B,T,D]`, what attention writes to the stream, output bias included.
        resid_mid: `[L,B,T,D]`, the stream between attention and MLP.
        mlp_out: `[L,B,T,D]`, what the MLP writes; None in attention-only models.
        final: `[B,T,D]`, the stream before the final norm.
        norm_attn_scale: `[L,B,T]`, the divisor of the norm before attention.
        norm_mlp_scale: `[L,B,T]`, the divisor of the norm before the MLP.
        norm_final_scale: `[B,T]`, the divisor of the final norm.
        q: `[L,B,T,H,K]`, queries, after RoPE.
        k: `[L,B,T,G,K]`, keys, after RoPE.
        v: `[L,B,T,G,K]`, values.
        pattern: `[L,B,H,T,S]`, attention probabilities.
        z: `[L,B,T,H,K]`, attention-weighted values of each head.
        mlp_act: `[L,B,T,F]`, what multiplies `w_out`.
        tokens: `[B,T]`, the token ids.
        mask: `[B,T]` bool, True at real tokens.
        layers: the layers held, ascending, or None for all.
        positions: the positions held, or None for all.
        lacks: the fields that the model itself does not have, such as an MLP's.
    """

    embed: Float[Array, "B T D"] = ABSENT
    resid_pre: Float[Array, "L B T D"] = ABSENT
    attn_out: Float[Array, "L B T D"] = ABSENT
    resid_mid: Float[Array, "L B T D"] = ABSENT
    mlp_out: Float[Array, "L B T D"] = ABSENT
    final: Float[Array, "B T D"] = ABSENT
    norm_attn_scale: Float[Array, "L B T"] = ABSENT
    norm_mlp_scale: Float[Array, "L B T"] = ABSENT
    norm_final_scale: Float[Array, "B T"] = ABSENT
    q: Float[Array, "L B T H K"] = ABSENT
    k: Float[Array, "L B T G K"] = ABSENT
    v: Float[Array, "L B T G K"] = ABSENT
    pattern: Float[Array, "L B H T S"] = ABSENT
    z: Float[Array, "L B T H K"] = ABSENT
    mlp_act: Float[Array, "L B T F"] = ABSENT
    tokens: Int[Array, "B T"] = ABSENT
    mask: Bool[Array, "B T"] = ABSENT
    layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    positions: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    lacks: tuple[str, ...] = field(default=(), metadata={"static": True})

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

    def at(self, positions: Int[Array, "... N"] | tuple[int, ...]) -> "ResidualStream":
        """The stream at these positions, counted in real tokens; zero where a row has none.

        Every field has N in place of T, `tokens` and `mask` too. Works with or without a batch.
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
        fields_at: dict[str, Any] = {
            name: select_positions(
                value,
                column,
                valid,
                value.ndim - TRAILING.get(name, 2),
                batch_axis=int(name not in UNSTACKED),
                absent=float(name in SCALES),
            )
            for name in FIELDS
            if (value := getattr(self, name)) is not None
        }
        if self.tokens is not None:
            fields_at["tokens"] = jnp.take_along_axis(self.tokens, index, -1)
        return ResidualStream(**fields_at, mask=valid, layers=self.layers, lacks=self.lacks)

    def squeezed(self) -> "ResidualStream":
        """A stream at one position, without the position axis."""
        values: dict[str, Any] = {
            name: jnp.squeeze(value, value.ndim - TRAILING.get(name, 2))
            for name in FIELDS
            if (value := getattr(self, name)) is not None
        }
        if self.tokens is not None:
            values["tokens"] = self.tokens[..., 0]
        return replace(self, **values, mask=self.mask[..., 0], positions=None)

    def batch_axes(self) -> "ResidualStream":
        """The `in_axes` pytree with which `jax.vmap` maps over the examples of the batch."""
        axes: dict[str, Any] = {
            f.name: 0 if f.name in (*UNSTACKED, "tokens", "mask") else 1
            for f in fields(self)
            if f.name not in ("layers", "positions", "lacks") and getattr(self, f.name) is not None
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
            raise ValueError(
                expected("capture", f"made of {(*FIELDS, 'logits')}", unknown, "name such fields")
            )


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
    mlp = () if config.d_mlp else ("mlp_out", "mlp_act", "norm_mlp_scale")
    return mlp if config.norm else tuple(sorted({*mlp, *SCALES}))


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
