"""Norms on the stream itself, as linear maps of the terms that are there before them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.labels import Kind
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.factors import AnyFactor, Factor


class StreamNorms:
    """The linear maps of norms on the stream itself, with their scales frozen.

    Norm j (two a layer) takes every term c that is there before it to `gain * centre(c) / s_j`.
    The scale differs from position to position: it goes to the coefficients. The rest goes to the
    directions. Each is divided by the typical scale, or the other way round, so that neither grows.
    """

    def __init__(self, model: Transformer, stream: ResidualStream, n_norms: int):
        """The first n norms of the model."""
        blocks = [block for block, _ in model.stacks()]
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

    def __call__(self, factor: AnyFactor, start: np.ndarray) -> Any:
        """Terms after the norms from `start` on, one number for each row of the factor."""
        rows = jnp.asarray(start)
        return factor.carried(self.after[rows], lambda x: self._mapped(x, rows))

    def _mapped(self, x: Array, start: Int[Array, " n"]) -> Array:
        start = start.reshape(-1, *(1,) * (x.ndim - 1))
        x = x.astype(self.gain.dtype)

        def step(x: Array, norm: tuple[Array, Array]) -> tuple[Array, None]:
            j, gain = norm
            mapped = self.centre(x) * gain.reshape(*(1,) * (x.ndim - 1), -1)
            return jnp.where(start <= j, mapped, x), None

        return jax.lax.scan(step, x, (jnp.arange(self.n_norms), self.gain))[0]

    def terms(
        self, written: tuple[AnyFactor, ...], layers: tuple[int, ...], half: int
    ) -> tuple[AnyFactor, ...]:
        """What attention (half 0) or MLP (1) wrote, after the norms; and its norm's bias."""
        norms = 2 * np.array(layers) + half
        start = np.minimum(norms + self.before, self.n_norms)
        carried = [self(factor, start) for factor in written]
        if self.bias is None:
            return tuple(carried)
        # A norm that is not reached (the last layer's MLP at resid_mid) is cut off later.
        bias = self.bias[np.minimum(norms, self.n_norms - 1)][:, None, None]
        ones = jnp.broadcast_to(self.real, (len(layers), *self.real.shape))
        factor = Factor(ones, bias, Kind("norm_bias", range(half, half + 1)))
        own = self(factor, np.minimum(norms + 1, self.n_norms))
        return (own, *carried) if self.before else (*carried, own)
