"""The terms that a stream is the sum of, as factors: what direct.py and readout.py stand on."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.axes import Array, Float, Int
from arrakis_jax.config import ModelConfig
from arrakis_jax.labels import Kind, Labels, Segment
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import contract, norm
from arrakis_jax.residuals import Record, ResidualStream

_MLP = ("mlp_act", "shared_act", "routing", "norm_mlp_out_scale")
CAPTURE = {
    "component": ("embed", "attn_out", "mlp_out"),
    "head": ("embed", "z", "norm_attn_out_scale", "mlp_out"),
    "neuron": ("embed", "attn_out", *_MLP),
    "expert": ("embed", "attn_out", "mlp_out", *_MLP),
}
BY = tuple(CAPTURE)
STREAM_NORMS = ("norm_attn_scale", "norm_mlp_scale")


def fields_for(config: ModelConfig, by: str) -> tuple[str, ...]:
    """The fields that the terms of this model need: with a rounded stream, what was rounded too."""
    rounded = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "final")
    names = (
        *CAPTURE[by],
        *(rounded if config.stream_dtype else ()),
        *(STREAM_NORMS if config.norms_stream else ()),
    )
    return tuple(dict.fromkeys(names))  # each once, in this order


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class Factor(Record):
    """The m terms of one kind in every layer of a segment.

    Attributes:
        coefficient: a vector's `[L,B,T,D]`, or `[L,B,T,m,K]`: heads' z, neurons' activations...
        direction: None, or what the coefficients multiply, `[L,m,K,D]`: heads' w_o, neurons' w_out.
    """

    coefficient: Array
    direction: Array | None = None

    def project(self, directions: Float[Array, "N D"]) -> Float[Array, "L m B T N"]:
        """Inner products with directions."""
        if self.direction is None:
            return contract("L...D,ND->L...N", self.coefficient, directions)[:, None]

        def of_layer(layer: tuple[Array, Array]) -> Array:
            coefficient, w_mKD = layer
            return contract(
                "...mK,NmK->m...N", coefficient, contract("mKD,ND->NmK", w_mKD, directions)
            )

        return jax.lax.map(of_layer, (self.coefficient, self.direction))

    def along(self, direction: Float[Array, "B T D"]) -> Float[Array, "L m B T"]:
        """Inner products with one direction per position."""
        if self.direction is None:
            return contract("L...D,...D->L...", self.coefficient, direction)[:, None]

        def of_layer(layer: tuple[Array, Array]) -> Array:
            coefficient, w_mKD = layer
            read = contract("mKD,...D->...mK", w_mKD, direction)
            return contract("...mK,...mK->m...", coefficient, read)

        return jax.lax.map(of_layer, (self.coefficient, self.direction))

    def norms(self) -> Float[Array, "L m B T"]:
        """Euclidean norms."""
        if self.direction is None:
            return norm(self.coefficient)[:, None]

        def of_layer(layer: tuple[Array, Array]) -> Array:
            coefficient, w_mKD = layer
            w_mKD = w_mKD.astype(jnp.promote_types(w_mKD.dtype, jnp.float32))
            if w_mKD.shape[1] == 1:
                size_m = norm(w_mKD[:, 0])
                return contract("...m,m->m...", jnp.abs(coefficient[..., 0]), size_m)
            # |z W| = |z R^T| with W^T = Q R: exact, in K dimensions in place of D.
            r_mJK = jnp.linalg.qr(jnp.swapaxes(w_mKD, -1, -2), mode="r")
            return norm(contract("...mK,mJK->m...J", coefficient, r_mJK))

        return jax.lax.map(of_layer, (self.coefficient, self.direction))

    def expand(self) -> Float[Array, "L m B T D"]:
        """The vectors."""
        if self.direction is None:
            return self.coefficient[:, None]
        return contract("L...mK,LmKD->Lm...D", self.coefficient, self.direction)

    def first(self, n: int) -> "Factor":
        """The terms of the first n layers."""
        return jax.tree.map(lambda x: x[:n], self)


Terms = list[tuple[Kind, Factor]]


def terms(
    model: Transformer,
    stream: ResidualStream,
    position: Int[Array, "..."],
    *,
    ends: tuple[int, int],
    by: str,
    layers: tuple[int, ...] | None = None,
) -> tuple[Array, tuple[tuple[Factor, ...], ...], Labels]:
    """The terms before the layers, those of each segment of layers, and what they are.

    `ends` counts the layers whose attention and whose MLP are written. The stream may have any
    axes between L and D.
    """
    config = model.config
    stream.need(
        *fields_for(config, by),
        all_layers=config.stream_dtype is not None or config.norms_stream,
    )
    wanted = tuple(range(ends[0])) if layers is None else tuple(i for i in layers if i < ends[0])
    names, first = ("embed",), stream.embed[None].astype(config.acc)
    if model.w_pos is not None:
        pos = jnp.where(stream.mask[..., None], model.embed_positions(position), 0)
        names, first = ("embed", "pos"), jnp.stack([stream.embed - pos, pos])
    carry = Carry(model, stream, sum(ends)) if config.norms_stream and sum(ends) else None
    if carry is not None:
        first = carry(Factor(first), np.zeros(len(names), int)).coefficient

    layered, segments, dropped = [], [], 0
    for i, (block, own) in enumerate(model.parts()):
        listed = tuple(layer for layer in wanted if layer in own)
        if not listed:
            continue
        part = Part(config, block, stream, i, own, listed)
        before, after = part.attention(by), part.mlp(by)
        if carry is not None:
            before, after = carry.terms(before, listed, 0), carry.terms(after, listed, 1)
        written = sum(layer < ends[1] for layer in listed) if after else len(listed)
        dropped += (len(listed) - written) * sum(kind.count for kind, _ in after)
        after = [(kind, factor.first(written)) for kind, factor in after]
        segments.append(Segment(listed, tuple(kind for kind, _ in (*before, *after))))
        layered.append(tuple(factor for _, factor in (*before, *after)))
    return first, tuple(layered), Labels(names, tuple(segments), dropped=dropped)


@dataclass(frozen=True)
class Part:
    """Some layers of one segment: what they write.

    Attributes:
        config: the model's.
        block: the segment's parameters.
        stream: a captured stream.
        index: which segment it is.
        own: its layers.
        listed: those whose terms are wanted.
    """

    config: ModelConfig
    block: Block
    stream: ResidualStream
    index: int
    own: range
    listed: tuple[int, ...]

    def attention(self, by: str) -> Terms:
        """The terms of attention."""
        if by == "head":
            attn = self.block.attn
            found = [(Kind("head", range(self.config.n_heads)), self._of("z"), self._w(attn.w_o))]
            if attn.b_o is not None:
                found.append((Kind("attn_bias"), self._ones(), self._w(attn.b_o)[:, None, None]))
            parts = self._written(found, "attn", 0)
        else:
            parts = [(Kind("attn"), Factor(self._of("attn_out")))]
        if self.config.stream_dtype is None or self.config.parallel:
            return parts
        rounding = self._of("resid_mid").astype(self.config.acc)
        rounding = rounding - self._of("resid_pre") - self._of("attn_out")
        return [*parts, (Kind("attn_rounding"), Factor(rounding))]

    def mlp(self, by: str) -> Terms:
        """The terms of the MLP or the experts."""
        mlp, moe = self.block.mlp, self.block.moe
        if mlp is None and moe is None:
            parts = []
        elif by == "neuron":
            parts = self._written(self._neurons(), "mlp", 1)
        elif by == "expert" and moe is not None:
            parts = self._written(self._experts(), "mlp", 1)
        else:
            parts = [(Kind("mlp"), Factor(self._of("mlp_out")))]
        if self.config.stream_dtype is None or (not parts and not self.config.parallel):
            return parts
        before = ("resid_pre", "attn_out") if self.config.parallel else ("resid_mid",)
        rounding = self.stream.resid_post[self._rows].astype(self.config.acc)
        for name in (*before, *(("mlp_out",) if parts else ())):
            rounding = rounding - self._of(name)
        return [*parts, (Kind("mlp_rounding"), Factor(rounding))]

    def _neurons(self) -> list[tuple[Kind, Array, Array]]:
        """Every hidden unit: its activation, and its row of `w_out`."""
        mlp, moe = self.block.mlp, self.block.moe
        if mlp is not None:
            found = [(Kind("neuron", range(self.config.d_mlp)), self._of("mlp_act")[..., None],
                      self._w(mlp.w_out)[:, :, None])]  # fmt: skip
            if mlp.b_out is not None:
                found.append((Kind("mlp_bias"), self._ones(), self._w(mlp.b_out)[:, None, None]))
            return found
        assert moe is not None
        act, gate = self._by_expert()
        units, rows = act.reshape(*gate.shape[:-1], -1), self._w(moe.w_out)
        rows = rows.reshape(rows.shape[0], -1, rows.shape[-1])
        gates, biases = [gate], [] if moe.b_out is None else [self._w(moe.b_out)]
        if moe.shared is not None:
            shared, weight = self._shared()
            units = jnp.concatenate([units, shared], -1)
            rows = jnp.concatenate([rows, self._w(moe.shared.w_out)], 1)
            if moe.shared.b_out is not None:
                gates.append(weight[..., None])
                biases.append(self._w(moe.shared.b_out)[:, None])
        found = [(Kind("neuron", range(units.shape[-1])), units[..., None], rows[:, :, None])]
        if biases:
            gate, bias = jnp.concatenate(gates, -1), jnp.concatenate(biases, 1)
            kind = Kind("mlp_bias", range(gate.shape[-1]))
            found.append((kind, gate[..., None], bias[:, :, None]))
        return found

    def _experts(self) -> list[tuple[Kind, Array, Array]]:
        """Every expert: its units' activations and one for its bias, and what they multiply."""
        moe = self.block.moe
        assert moe is not None
        act, gate = self._by_expert()
        rows = self._w(moe.w_out)
        if moe.b_out is not None:
            act = jnp.concatenate([act, gate[..., None]], -1)
            rows = jnp.concatenate([rows, self._w(moe.b_out)[:, :, None]], 2)
        found = [(Kind("expert", range(self.config.n_experts)), act, rows)]
        if moe.shared is not None:
            act, gate = self._shared()
            rows = self._w(moe.shared.w_out)
            if moe.shared.b_out is not None:
                act = jnp.concatenate([act, gate[..., None]], -1)
                rows = jnp.concatenate([rows, self._w(moe.shared.b_out)[:, None]], 1)
            found.append((Kind("shared_expert"), act[..., None, :], rows[:, None]))
        return found

    def _by_expert(self) -> tuple[Float[Array, "L ... E F"], Float[Array, "L ... E"]]:
        """Activations times routing weights, and routing weights: zero for experts not used."""
        routing, acc = self._of("routing"), self.config.acc
        hot = jax.nn.one_hot(routing.index, self.config.n_experts, dtype=acc)
        hot = hot * routing.weight[..., None]
        return contract("...kE,...kF->...EF", hot, self._of("mlp_act")), hot.sum(-2)

    def _shared(self) -> tuple[Float[Array, "L ... F"], Float[Array, "L ..."]]:
        """The shared expert's activations times its gate, and the gate."""
        gate = self._of("routing").shared
        return self._of("shared_act").astype(self.config.acc) * gate[..., None], gate

    def _written(self, found: list[tuple[Kind, Array, Array]], what: str, index: int) -> Terms:
        """The factors as they reach the stream: through a norm of the output, and scaled."""
        output: Norm | None = getattr(self.block, f"norm_{what}_out")
        acc, scale = self.config.acc, self.config.residual_scale
        if output is not None:
            scale = scale / self._of(f"norm_{what}_out_scale")[..., None, None]
        parts = []
        for kind, coefficient, direction in found:
            if output is not None:
                direction = output.centre(direction.astype(acc))
                if output.gain is not None:
                    direction = direction * output.gain[self._local][:, None, None]
            parts.append((kind, Factor(coefficient.astype(acc) * scale, direction)))
        if output is not None and output.b is not None:
            ones = self._ones() * self.config.residual_scale
            bias = Factor(ones, self._w(output.b)[:, None, None])
            parts.append((Kind("norm_bias", range(index, index + 1)), bias))
        return parts

    def _ones(self) -> Float[Array, "L ... 1 1"]:
        """What multiplies a bias: one at real tokens."""
        real = self.stream.mask[..., None, None].astype(self.config.acc)
        return jnp.broadcast_to(real, (len(self.listed), *real.shape))

    def _w(self, param) -> Array:
        """A parameter of the listed layers."""
        return param[...][self._local]

    def _of(self, name: str):
        """A field of the stream at the listed layers."""
        value = getattr(self.stream, name)
        if isinstance(value, tuple):
            held = self.stream.layers
            held = self.own if held is None else [i for i in held if i in self.own]
            return jax.tree.map(lambda x: x[_rows(held, self.listed)], value[self.index])
        return jax.tree.map(lambda x: x[self._rows], value)

    @property
    def _local(self) -> slice | np.ndarray:
        return _rows(self.own, self.listed)

    @property
    def _rows(self) -> slice | np.ndarray:
        """Where the listed layers stand on the L axis of the stream."""
        held = self.stream.layers
        if held is None:
            return _rows(range(self.config.n_layers), self.listed)
        if not set(self.listed) <= set(held):
            self.stream.need(all_layers=True)
        return _rows(held, self.listed)


def _rows(held, wanted: tuple[int, ...]) -> slice | np.ndarray:
    """Where these layers stand among others, as a slice if they follow one another."""
    rows = [list(held).index(layer) for layer in wanted]
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return np.array(rows)


class Carry:
    """The linear maps of norms on the stream itself, with their scales frozen.

    Norm j (two a layer) takes every term c that is there before it to `gain * centre(c) / s_j`.
    The scale differs from position to position: it goes to the coefficients. The rest goes to the
    directions. Each is divided by the typical scale, or the other way round, so that neither grows.
    """

    def __init__(self, model: Transformer, stream: ResidualStream, n_norms: int):
        """The first n norms of the model."""
        blocks = [block for block, _ in model.parts()]
        pairs: list[list[Any]] = [[b.norm_attn for b in blocks], [b.norm_mlp for b in blocks]]

        def alternating(stacks: list[Array]) -> Array:
            stacked = jnp.stack(stacks, 1)
            return stacked.reshape(-1, *stacked.shape[2:])[:n_norms]

        scale = alternating([stream.norm_attn_scale, stream.norm_mlp_scale])
        typical = jnp.exp(jnp.mean(jnp.log(scale), tuple(range(1, scale.ndim))))
        ratios = typical.reshape(-1, *(1,) * (scale.ndim - 1)) / scale
        ends = jnp.cumprod(jnp.flip(ratios, 0), 0)
        # after[j]: the coefficients' share of norms j and later.
        self.after = jnp.concatenate([jnp.flip(ends, 0), jnp.ones_like(scale[:1])])[: n_norms + 1]
        acc = model.config.acc
        self.gain = jnp.ones((1, model.config.d_model), acc) / typical[:, None]
        if pairs[0][0].gain is not None:
            gains = [jnp.concatenate([n.gain for n in norms]) for norms in pairs]
            self.gain = self.gain * alternating(gains)
        self.real = stream.mask[..., None, None].astype(acc)
        self.bias = None
        if pairs[0][0].b is not None:
            self.bias = alternating(
                [jnp.concatenate([n.b[...].astype(acc) for n in norms]) for norms in pairs]
            )
        self.centre = pairs[0][0].centre
        self.before = int(model.config.norm_placement == "stream_before")
        self.n_norms = n_norms

    def __call__(self, factor: Factor, start: np.ndarray) -> Factor:
        """Terms after the norms from `start` on, one number for each row of the factor."""
        rows = jnp.asarray(start)
        if factor.direction is None:
            share = self.after[rows][..., None]
            return Factor(self._mapped(factor.coefficient, rows) * share)
        share = self.after[rows][..., None, None]
        return Factor(factor.coefficient * share, self._mapped(factor.direction, rows))

    def _mapped(self, x: Array, start: Int[Array, " n"]) -> Array:
        start = start.reshape(-1, *(1,) * (x.ndim - 1))
        x = x.astype(self.gain.dtype)

        def step(x: Array, norm: tuple[Array, Array]) -> tuple[Array, None]:
            j, gain = norm
            mapped = self.centre(x) * gain.reshape(*(1,) * (x.ndim - 1), -1)
            return jnp.where(start <= j, mapped, x), None

        return jax.lax.scan(step, x, (jnp.arange(self.n_norms), self.gain))[0]

    def terms(self, written: Terms, layers: tuple[int, ...], half: int) -> Terms:
        """What attention (half 0) or MLP (1) wrote, after the norms; and its norm's bias."""
        norms = 2 * np.array(layers) + half
        start = np.minimum(norms + self.before, self.n_norms)
        carried = [(kind, self(factor, start)) for kind, factor in written]
        if self.bias is None:
            return carried
        # A norm that is not reached (the last layer's MLP at resid_mid) is cut off later.
        bias = self.bias[np.minimum(norms, self.n_norms - 1)][:, None, None]
        ones = jnp.broadcast_to(self.real, (len(layers), *self.real.shape))
        own = self(Factor(ones, bias), np.minimum(norms + 1, self.n_norms))
        kind = Kind("norm_bias", range(half, half + 1))
        return [(kind, own), *carried] if self.before else [*carried, (kind, own)]
