"""The terms that one layer writes, at the granularity asked for."""

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
# The fields that the terms need, for each granularity `by`: of attention, and of the MLP.
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
    """Whether a selection of kinds includes any of these."""
    return kinds is None or bool(set(kinds) & set(some))


def of_kinds(
    factors: tuple[AnyFactor, ...], kinds: tuple[str, ...] | None
) -> tuple[AnyFactor, ...]:
    """The factors of these kinds; all of them for None."""
    return tuple(f for f in factors if kinds is None or f.kind.name in kinds)


class LayerTerms:
    """The terms that one layer writes. The layer must have the fields that they need."""

    def __init__(self, config: ModelConfig, layer: Layer):
        self.config = config
        self.block = layer.block
        # The fields are arrays of one layer, without the L axis that their types declare.
        self.stream: Any = layer.stream
        self.resid_post = layer.resid_post

    def halves(
        self, by: str, kinds: tuple[str, ...] | None = None
    ) -> tuple[tuple[AnyFactor, ...], tuple[AnyFactor, ...]]:
        """The terms of these kinds, in two tuples: from attention, and from the MLP."""
        attention = self.attention(by) if wants(kinds, ATTENTION_KINDS) else ()
        mlp = self.mlp(by) if wants(kinds, MLP_KINDS) else ()
        return of_kinds(attention, kinds), of_kinds(mlp, kinds)

    def norm_bias(self, half: int) -> Factor | None:
        """The bias of the norm on the stream at attention (half 0) or the MLP (1); or None."""
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
            factors: list[Any] = [Factor(self.stream.z, w_o, heads) if by == "head"
                                else self._sources(w_o)]  # fmt: skip
            if attn.b_o is not None:
                factors.append(self._bias(attn.b_o[...], Kind("attn_bias")))
            parts = self._written(factors, "attn", 0)
        else:
            parts = [Factor(self.stream.attn_out, None, Kind("attn"))]
        if self.config.stream_dtype is None or self.config.parallel:
            return tuple(parts)
        # A rounded stream is not the exact sum of its terms. The difference becomes a term.
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
        # A parallel block rounds its sum once, so this term has the rounding of both halves.
        before = ("resid_pre", "attn_out") if self.config.parallel else ("resid_mid",)
        rounding = self.resid_post.astype(self.config.acc)
        for name in (*before, *(("mlp_out",) if parts else ())):
            rounding = rounding - getattr(self.stream, name)
        return (*parts, Factor(rounding, None, Kind("mlp_rounding")))

    def _sources(self, w_o: Array) -> Sources:
        """The terms of every head, split by the position of the value that it reads."""
        do = "use by='head', or edit 'pattern' or 'v': z is their product no longer"
        self.stream.need_unedited(("z",), "by='source'", do)
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
        """Every hidden unit as its activation and its row of `w_out`; and the biases."""
        mlp, moe = self.block.mlp, self.block.moe
        if mlp is not None:
            kind = Kind("neuron", range(self.config.d_mlp))
            factors = [Factor(self.stream.mlp_act[..., None], mlp.w_out[...][:, None], kind)]
            return factors if mlp.b_out is None else [
                *factors, self._bias(mlp.b_out[...], Kind("mlp_bias"))]  # fmt: skip
        assert moe is not None
        # Neuron n of expert e is number e * F + n. The shared expert's neurons follow.
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
        factors = [Factor(units[..., None], rows[:, None], Kind("neuron", range(units.shape[-1])))]
        if biases:
            # An expert's bias is written as strongly as the expert is used, hence the gates.
            gate, bias = jnp.concatenate(gates, -1), jnp.concatenate(biases)
            kind = Kind("mlp_bias", range(gate.shape[-1]))
            factors.append(Factor(gate[..., None], bias[:, None], kind))
        return factors

    def _experts(self) -> list[Factor]:
        """Every expert as the activations of its units and their rows of `w_out`."""
        moe = self.block.moe
        assert moe is not None
        act, gate = self._by_expert()
        rows = moe.w_out[...]
        if moe.b_out is not None:
            # The bias is one more unit, with the gate as its activation: an expert stays one term.
            act = jnp.concatenate([act, gate[..., None]], -1)
            rows = jnp.concatenate([rows, moe.b_out[...][:, None]], 1)
        factors = [Factor(act, rows, Kind("expert", range(self.config.n_experts)))]
        if moe.shared is not None:
            act, gate = self._shared()
            rows = moe.shared.w_out[...]
            if moe.shared.b_out is not None:
                act = jnp.concatenate([act, gate[..., None]], -1)
                rows = jnp.concatenate([rows, moe.shared.b_out[...][None]])
            factors.append(Factor(act[..., None, :], rows[None], Kind("shared_expert")))
        return factors

    def _by_expert(self) -> tuple[Float[Array, "... E F"], Float[Array, "... E"]]:
        """Activations times routing weights, and routing weights; zero for experts not used."""
        # A token has k experts. The one-hot spreads them over all E: every token has all terms.
        routing, acc = self.stream.routing, self.config.acc
        hot = jax.nn.one_hot(routing.index, self.config.n_experts, dtype=acc)
        hot = hot * routing.weight[..., None]
        return contract("...kE,...kF->...EF", hot, self.stream.mlp_act), hot.sum(-2)

    def _shared(self) -> tuple[Float[Array, "... F"], Float[Array, "..."]]:
        """The shared expert's activations times its gate, and the gate."""
        gate = self.stream.routing.shared
        return self.stream.shared_act.astype(self.config.acc) * gate[..., None], gate

    def _written(self, factors: list[Any], module: str, index: int) -> list[AnyFactor]:
        """The factors as they reach the stream: through the norm of the output, and scaled."""
        output: Norm | None = getattr(self.block, f"norm_{module}_out")
        scale = self.config.residual_scale
        if output is None and scale == 1:
            return factors
        through, share = written(self.config, self.stream, output, module)
        parts = [factor.carried(share, through) for factor in factors]
        if output is not None and output.b is not None:
            bias = self._bias(output.b[...], Kind("norm_bias", range(index, index + 1)))
            parts.append(replace(bias, coefficient=bias.coefficient * scale))
        return parts

    def _bias(self, bias: Float[Array, " D"], kind: Kind) -> Factor:
        """A bias, written at real tokens only."""
        # The mask is the coefficient: the bias is zero at padding, and is not copied to positions.
        real = self.stream.mask[..., None, None].astype(self.config.acc)
        return Factor(real, bias[None, None], kind)
