"""Norms on the stream itself, as linear maps of all earlier terms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import all_at_once
from arrakis_jax.results.labels import Kind
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.factors import AnyFactor, Factor


class StreamNorms:
    """The linear maps of norms on the stream itself, with their scales frozen.

    Norm j (two a layer) maps every earlier term c to `gain * centre(c) / s_j`. The scale differs
    between positions, so it goes to the coefficients, times the typical scale. The rest of the map
    goes to the directions, divided by the typical scale. So neither grows with depth.
    """

    def __init__(self, model: Transformer, stream: ResidualStream, n_norms: int):
        """The first n norms of the model."""
        scales = (stream.norm_attn_scale, stream.norm_mlp_scale)
        scale = _alternating(*scales)[:n_norms]
        # The geometric mean over positions. Scales at padding are 1, so their logarithm is finite.
        self.typical = jnp.exp(jnp.mean(jnp.log(scale), tuple(range(1, scale.ndim))))
        ratios = self.typical.reshape(-1, *(1,) * (scale.ndim - 1)) / scale
        ends = jnp.cumprod(jnp.flip(ratios, 0), 0)
        # after[j]: the factor of norms j and later on the coefficients; 1 after the last norm.
        self.after = jnp.concatenate([jnp.flip(ends, 0), jnp.ones_like(scale[:1])])
        norms = all_at_once(model, lambda place, _: (place.block.norm_attn, place.block.norm_mlp))
        pairs = jax.tree.map(lambda *segments: jnp.concatenate(segments), *norms)
        self.norms: Any = jax.tree.map(lambda *pair: _alternating(*pair)[:n_norms], *pairs)
        self.real = stream.mask[..., None, None].astype(model.config.acc)
        self.acc = model.config.acc
        self.before = int(model.config.norm_placement == "stream_before")
        self.n_norms = n_norms

    def __call__(self, factor: AnyFactor, start: np.ndarray) -> Any:
        """Terms after the norms from `start` on; `start` has one number per row of the factor."""
        rows = jnp.asarray(start)
        return factor.carried(self.after[rows], lambda x: self._mapped(x, rows))

    def _mapped(self, x: Array, start: Int[Array, " n"]) -> Array:
        # All rows pass through all norms at once: a row waits unchanged until its start.
        start = start.reshape(-1, *(1,) * (x.ndim - 1))

        def step(x: Array, norm_j: tuple[Array, Any, Array]) -> tuple[Array, None]:
            j, norm, typical = norm_j
            return jnp.where(start <= j, norm.linear(x) / typical, x), None

        norms = (jnp.arange(self.n_norms), self.norms, self.typical)
        return jax.lax.scan(step, x.astype(self.acc), norms)[0]

    def terms(
        self, written: tuple[AnyFactor, ...], layers: tuple[int, ...], half: int
    ) -> tuple[AnyFactor, ...]:
        """The terms of attention (half 0) or the MLP (1) after the norms, and its norm's bias."""
        # With `stream_before`, a write comes after its own norm and first meets the next one.
        norms = 2 * np.array(layers) + half
        start = np.minimum(norms + self.before, self.n_norms)
        carried = [self(factor, start) for factor in written]
        if self.norms.b is None:
            return tuple(carried)
        # At resid_mid the span does not reach the norm of the last MLP: a row is cut off later.
        bias = self.norms.b[...].astype(self.acc)
        bias = bias[np.minimum(norms, self.n_norms - 1)][:, None, None]
        ones = jnp.broadcast_to(self.real, (len(layers), *self.real.shape))
        factor = Factor(ones, bias, Kind("norm_bias", range(half, half + 1)))
        norm_bias = self(factor, np.minimum(norms + 1, self.n_norms))
        return (norm_bias, *carried) if self.before else (*carried, norm_bias)


def _alternating(of_attention: Array, of_mlps: Array) -> Array:
    """The two `[L,...]` as `[2L,...]`, in the order of the norms in the model."""
    stacked = jnp.stack([of_attention, of_mlps], 1)
    return stacked.reshape(-1, *stacked.shape[2:])
