"""The pytrees that everything speaks: the residual stream, what to capture of it, and edits."""

from dataclasses import dataclass, field, fields

import jax
import jax.numpy as jnp

from arrakis_jax.axes import Array, Bool, Float, Int
from arrakis_jax.errors import NotCapturedError, expected

# Where the batch axis stands in each field; fields with an L axis have it first.
UNSTACKED = ("embed", "final", "norm_final_scale")
STREAM = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "final")
SCALES = ("norm_attn_scale", "norm_mlp_scale", "norm_final_scale")
INTERNAL = ("q", "k", "v", "pattern", "z", "mlp_act")
FIELDS = STREAM + SCALES + INTERNAL


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ResidualStream:
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
    """

    embed: Float[Array, "B T D"] | None = None
    resid_pre: Float[Array, "L B T D"] | None = None
    attn_out: Float[Array, "L B T D"] | None = None
    resid_mid: Float[Array, "L B T D"] | None = None
    mlp_out: Float[Array, "L B T D"] | None = None
    final: Float[Array, "B T D"] | None = None
    norm_attn_scale: Float[Array, "L B T"] | None = None
    norm_mlp_scale: Float[Array, "L B T"] | None = None
    norm_final_scale: Float[Array, "B T"] | None = None
    q: Float[Array, "L B T H K"] | None = None
    k: Float[Array, "L B T G K"] | None = None
    v: Float[Array, "L B T G K"] | None = None
    pattern: Float[Array, "L B H T S"] | None = None
    z: Float[Array, "L B T H K"] | None = None
    mlp_act: Float[Array, "L B T F"] | None = None
    tokens: Int[Array, "B T"] | None = None
    mask: Bool[Array, "B T"] | None = None
    layers: tuple[int, ...] | None = field(default=None, metadata={"static": True})
    positions: tuple[int, ...] | None = field(default=None, metadata={"static": True})

    @property
    def resid_post(self) -> Float[Array, "L B T D"]:
        """`[L,B,T,D]`, the stream leaving each block: the next `resid_pre`, and `final` last."""
        self.need("resid_pre", "final", all_layers=True)
        return jnp.concatenate([self.resid_pre[1:], self.final[None]])

    def need(self, *names: str, all_layers: bool = False, all_positions: bool = False) -> None:
        """Raises NotCapturedError unless every named field is here, for all layers if asked."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise NotCapturedError(
                f"`residuals` must be captured with {missing}, got a stream without; "
                f"run the model with capture={tuple(names)!r} (or 'residuals', 'all')"
            )
        for what, wanted in (("layers", all_layers), ("positions", all_positions)):
            held = getattr(self, what)
            if wanted and held is not None:
                raise NotCapturedError(
                    f"`residuals` must be captured at all {what}, got only {held}; "
                    f"run the model with {what}=None in its Capture"
                )

    def batch_axes(self) -> "ResidualStream":
        """The `in_axes` pytree with which `jax.vmap` maps over the examples of the batch."""
        axes = {
            f.name: 0 if f.name in (*UNSTACKED, "tokens", "mask") else 1
            for f in fields(self)
            if f.name not in ("layers", "positions") and getattr(self, f.name) is not None
        }
        return ResidualStream(**axes, layers=self.layers, positions=self.positions)

    def example(self, b: int) -> "ResidualStream":
        """The stream of example `b`, without the batch axis: what vmap hands to its function."""
        return jax.tree.map(lambda x, axis: jnp.take(x, b, axis), self, self.batch_axes())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ModelOutput:
    """What a forward returns: `logits [B,T,V]` (None if not captured) and the residual stream."""

    logits: Float[Array, "B T V"] | None
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
        unknown = [name for name in self.fields if name not in (*FIELDS, "logits")]
        if unknown:
            raise ValueError(
                expected("capture", f"made of {(*FIELDS, 'logits')}", unknown, "name such fields")
            )


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
    return Capture(tuple(capture))


def select_positions(
    value: Array,
    index_BN: Int[Array, "B N"] | None,
    valid_BN: Bool[Array, "B N"] | None,
    axis: int = 1,
    absent: float = 0,
) -> Array:
    """`value` at the given positions of its T axis, `absent` where a row has no such position."""
    if index_BN is None:
        return value
    shape = [1] * value.ndim
    shape[0], shape[axis] = index_BN.shape
    picked = jnp.take_along_axis(value, index_BN.reshape(shape), axis)
    return jnp.where(valid_BN.reshape(shape), picked, absent)
