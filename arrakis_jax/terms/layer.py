"""What one layer writes, taken apart as finely as asked for."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import NotCapturedError
from arrakis_jax.core.numerics import contract
from arrakis_jax.frozen.writes import written
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Layer
from arrakis_jax.results.labels import Kind
from arrakis_jax.terms.factors import AnyFactor, Factor, Sources

_MLP = ("mlp_act", "shared_act", "routing", "norm_mlp_out_scale")
# What the terms of attention and those of the MLP are made of.
ATTENTION_FACTORS = {
    "component": ("attn_out",),
    "head": ("z", "norm_attn_out_scale"),
    "neuron": ("attn_out",),
    "expert": ("attn_out",),
    "source": ("pattern", "v", "norm_attn_out_scale"),
}
MLP_FACTORS = {
    "component": ("mlp_out",),
    "head": ("mlp_out",),
    "neuron": _MLP,
    "expert": ("mlp_out", *_MLP),
    "source": ("mlp_out",),
}
BY = tuple(ATTENTION_FACTORS)
FIRST_KINDS = ("embed", "pos")
ATTENTION_KINDS = ("attn", "head", "attn_bias", "norm_bias", "attn_rounding")
MLP_KINDS = ("mlp", "neuron", "mlp_bias", "expert", "shared_expert", "norm_bias", "mlp_rounding")
KINDS = tuple(dict.fromkeys((*FIRST_KINDS, "norm", *ATTENTION_KINDS, *MLP_KINDS)))


def wants(kinds: tuple[str, ...] | None, some: tuple[str, ...]) -> bool:
    """Whether a selection of kinds holds any of these."""
    return kinds is None or bool(set(kinds) & set(some))


def of_kinds(
    factors: tuple[AnyFactor, ...], kinds: tuple[str, ...] | None
) -> tuple[AnyFactor, ...]:
    """Those of the factors that are of these kinds."""
    return tuple(f for f in factors if kinds is None or f.kind.name in kinds)


class LayerTerms:
    """The terms that one layer writes, of a layer with the fields that they need."""

    def __init__(self, config: ModelConfig, layer: Layer):
        self.config = config
        self.block = layer.block
        self.stream: Any = layer.stream  # whose fields are here arrays of one layer
        self.resid_post = layer.resid_post

    def halves(
        self, by: str, kinds: tuple[str, ...] | None = None
    ) -> tuple[tuple[AnyFactor, ...], tuple[AnyFactor, ...]]:
        """The terms of these kinds that attention writes, and those that the MLP writes."""
        attention = self.attention(by) if wants(kinds, ATTENTION_KINDS) else ()
        mlp = self.mlp(by) if wants(kinds, MLP_KINDS) else ()
        return of_kinds(attention, kinds), of_kinds(mlp, kinds)

    def norm_bias(self, half: int) -> Factor | None:
        """What the norm on the stream adds at attention (half 0) or the MLP (1); or None."""
        norm = (self.block.norm_attn, self.block.norm_mlp)[half]
        if not self.config.norms_stream or norm is None or norm.b is None:
            return None
        return self._bias(norm.b[...], Kind("norm_bias", range(half, half + 1)))

    def attention(self, by: str) -> tuple[AnyFactor, ...]:
        """The terms of attention."""
        attn = self.block.attn
        if by in ("head", "source"):
            w_o = attn.w_o[...]
            heads = Kind("head", range(self.config.n_heads))
            found: list[Any] = [Factor(self.stream.z, w_o, heads) if by == "head"
                                else self._sources(w_o)]  # fmt: skip
            if attn.b_o is not None:
                found.append(self._bias(attn.b_o[...], Kind("attn_bias")))
            parts = self._written(found, "attn", 0)
        else:
            parts = [Factor(self.stream.attn_out, None, Kind("attn"))]
        if self.config.stream_dtype is None or self.config.parallel:
            return tuple(parts)
        rounding = self.stream.resid_mid.astype(self.config.acc)
        rounding = rounding - self.stream.resid_pre - self.stream.attn_out
        return (*parts, Factor(rounding, None, Kind("attn_rounding")))

    def mlp(self, by: str) -> tuple[AnyFactor, ...]:
        """The terms of the MLP or the experts."""
        mlp, moe = self.block.mlp, self.block.moe
        if mlp is None and moe is None:
            parts = []
        elif by == "neuron":
            parts = self._written(self._neurons(), "mlp", 1)
        elif by == "expert" and moe is not None:
            parts = self._written(self._experts(), "mlp", 1)
        else:
            parts = [Factor(self.stream.mlp_out, None, Kind("mlp"))]
        if self.config.stream_dtype is None or (not parts and not self.config.parallel):
            return tuple(parts)
        before = ("resid_pre", "attn_out") if self.config.parallel else ("resid_mid",)
        rounding = self.resid_post.astype(self.config.acc)
        for name in (*before, *(("mlp_out",) if parts else ())):
            rounding = rounding - getattr(self.stream, name)
        return (*parts, Factor(rounding, None, Kind("mlp_rounding")))

    def _sources(self, w_o: Array) -> Sources:
        """Every head's values, by the position that they come from."""
        pattern, v = self.stream.pattern, self.stream.v
        n = v.shape[-3]
        if pattern.shape[-1] != n:
            raise NotCapturedError(
                f"`residuals` must be captured with v at all {pattern.shape[-1]} positions, got it "
                f"at {n}; run the model with positions=None in its Capture"
            )
        acc = self.config.acc
        kind = Kind("head", range(self.config.n_heads), n)
        return Sources(pattern.astype(acc), v.astype(acc), w_o, kind)

    def _neurons(self) -> list[Factor]:
        """Every hidden unit: its activation, and its row of `w_out`."""
        mlp, moe = self.block.mlp, self.block.moe
        if mlp is not None:
            kind = Kind("neuron", range(self.config.d_mlp))
            found = [Factor(self.stream.mlp_act[..., None], mlp.w_out[...][:, None], kind)]
            return found if mlp.b_out is None else [
                *found, self._bias(mlp.b_out[...], Kind("mlp_bias"))]  # fmt: skip
        assert moe is not None
        act, gate = self._by_expert()
        units, rows = act.reshape(*gate.shape[:-1], -1), moe.w_out[...]
        rows = rows.reshape(-1, rows.shape[-1])
        gates, biases = [gate], [] if moe.b_out is None else [moe.b_out[...]]
        if moe.shared is not None:
            shared, weight = self._shared()
            units = jnp.concatenate([units, shared], -1)
            rows = jnp.concatenate([rows, moe.shared.w_out[...]])
            if moe.shared.b_out is not None:
                gates.append(weight[..., None])
                biases.append(moe.shared.b_out[...][None])
        found = [Factor(units[..., None], rows[:, None], Kind("neuron", range(units.shape[-1])))]
        if biases:
            gate, bias = jnp.concatenate(gates, -1), jnp.concatenate(biases)
            kind = Kind("mlp_bias", range(gate.shape[-1]))
            found.append(Factor(gate[..., None], bias[:, None], kind))
        return found

    def _experts(self) -> list[Factor]:
        """Every expert: its units' activations and one for its bias, and what they multiply."""
        moe = self.block.moe
        assert moe is not None
        act, gate = self._by_expert()
        rows = moe.w_out[...]
        if moe.b_out is not None:
            act = jnp.concatenate([act, gate[..., None]], -1)
            rows = jnp.concatenate([rows, moe.b_out[...][:, None]], 1)
        found = [Factor(act, rows, Kind("expert", range(self.config.n_experts)))]
        if moe.shared is not None:
            act, gate = self._shared()
            rows = moe.shared.w_out[...]
            if moe.shared.b_out is not None:
                act = jnp.concatenate([act, gate[..., None]], -1)
                rows = jnp.concatenate([rows, moe.shared.b_out[...][None]])
            found.append(Factor(act[..., None, :], rows[None], Kind("shared_expert")))
        return found

    def _by_expert(self) -> tuple[Float[Array, "... E F"], Float[Array, "... E"]]:
        """Activations times routing weights, and routing weights: zero for experts not used."""
        routing, acc = self.stream.routing, self.config.acc
        hot = jax.nn.one_hot(routing.index, self.config.n_experts, dtype=acc)
        hot = hot * routing.weight[..., None]
        return contract("...kE,...kF->...EF", hot, self.stream.mlp_act), hot.sum(-2)

    def _shared(self) -> tuple[Float[Array, "... F"], Float[Array, "..."]]:
        """The shared expert's activations times its gate, and the gate."""
        gate = self.stream.routing.shared
        return self.stream.shared_act.astype(self.config.acc) * gate[..., None], gate

    def _written(self, found: list[Any], what: str, index: int) -> list[AnyFactor]:
        """The factors as they reach the stream: through a norm of the output, and scaled."""
        output: Norm | None = getattr(self.block, f"norm_{what}_out")
        scale = self.config.residual_scale
        if output is None and scale == 1:
            return found
        through, share = written(self.config, self.stream, output, what)
        parts = [factor.carried(share, through) for factor in found]
        if output is not None and output.b is not None:
            bias = self._bias(output.b[...], Kind("norm_bias", range(index, index + 1)))
            parts.append(replace(bias, coefficient=bias.coefficient * scale))
        return parts

    def _bias(self, bias: Float[Array, " D"], kind: Kind) -> Factor:
        """A bias, written at real tokens."""
        real = self.stream.mask[..., None, None].astype(self.config.acc)
        return Factor(real, bias[None, None], kind)
