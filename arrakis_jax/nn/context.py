"""What attention needs to know of positions: rotations, allowed keys and ALiBi's biases."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int, over
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.nn.rotary import rotation
from arrakis_jax.stream.padding import Padding


@dataclass(frozen=True)
class AttentionContext:
    """What attention in one layer needs to know of positions.

    Attributes:
        rotation: cosines and sines `[B,T,K/2]`, or None without RoPE.
        allowed: `[B,T,S]` (or `[1,T,S]`), True where a query may read a key.
        bias: `[B,H,S]`, ALiBi's bias on scores, or None.
        before: keys and values `[B,N,G,K]` of N earlier tokens; S is then N + T.
    """

    rotation: tuple[Array, Array] | None
    allowed: Bool[Array, "B T S"]
    bias: Float[Array, "B H S"] | None
    before: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class AttentionContexts:
    """The `AttentionContext` of every layer. Each kind is computed once, outside the scan.

    Attributes:
        rotations: the distinct rotations in the model; None if no layer rotates.
        rotation_of_layer: `[L]`, the index in `rotations` for each layer.
        allowed: the distinct `AttentionContext.allowed` in the model.
        allowed_of_layer: `[L]`, the index in `allowed` for each layer.
        bias: ALiBi's bias.
        before: keys and values `[L,B,N,G,K]` of N earlier tokens.
    """

    rotations: list[tuple[Array, Array]] | None
    rotation_of_layer: np.ndarray
    allowed: list[Array]
    allowed_of_layer: np.ndarray
    bias: Array | None
    before: tuple[Array, Array] | None = None

    @classmethod
    def of(cls, config: ModelConfig, padding: Padding) -> "AttentionContexts":
        """The contexts of all layers of this config, for tokens with this padding."""
        windowed = _per_layer(config, config.window_layers, config.window is not None)
        rotations, rotation_of_layer = None, np.zeros(len(windowed), int)
        if config.rope_theta is not None:
            rotations, rotation_of_layer = _rotations(config, padding, windowed)
        spans = [config.window if kind else None for kind in np.unique(windowed)]
        return cls(
            rotations=rotations,
            rotation_of_layer=rotation_of_layer,
            allowed=[padding.allowed(span) for span in spans],
            allowed_of_layer=windowed if len(spans) > 1 else np.zeros(len(windowed), int),
            bias=alibi(config, padding.rank) if config.positions == "alibi" else None,
        )

    def after(self, before: tuple[Array, Array]) -> "AttentionContexts":
        """The contexts of the later tokens alone, given the keys and values of the earlier."""
        # Only the query axis is cut: later tokens still read the keys of earlier ones.
        n = before[0].shape[2]
        rotations, allowed = jax.tree.map(lambda x: x[:, n:], (self.rotations, self.allowed))
        return replace(self, rotations=rotations, allowed=allowed, before=before)

    def at(self, layer: Int[Array, ""]) -> AttentionContext:
        """The context of this layer."""
        turn = (
            None if self.rotations is None else _pick(self.rotations, self.rotation_of_layer, layer)
        )
        before = jax.tree.map(lambda x: x[layer], self.before)
        return AttentionContext(
            turn, _pick(self.allowed, self.allowed_of_layer, layer), self.bias, before
        )


def _per_layer(config: ModelConfig, flags: tuple[bool, ...] | None, default: bool) -> np.ndarray:
    # A model without layers has one entry too, so that the kinds below are never none.
    return np.array((default,) * max(config.n_layers, 1) if flags is None else flags, int)


def _rotations(
    config: ModelConfig, padding: Padding, windowed: np.ndarray
) -> tuple[list[tuple[Array, Array]], np.ndarray]:
    """The distinct rotations (0 ordinary, 1 with a window, 2 none), and each layer's index."""
    theta = config.rope_theta
    assert theta is not None
    kinds = windowed * (config.window_rope_theta is not None)
    kinds = np.where(_per_layer(config, config.rope_layers, True), kinds, 2)
    rotations = []
    for kind in np.unique(kinds):
        if kind == 1:
            theta, scaling = config.window_rope_theta or theta, config.window_rope_scaling
        else:
            theta, scaling = config.rope_theta or theta, config.rope_scaling
        # A layer that does not rotate turns by zero, so that all layers run the same program.
        cos, sin = rotation(config, theta, scaling, padding.rank, padding.count)
        rotations.append((jnp.ones_like(cos), jnp.zeros_like(sin)) if kind == 2 else (cos, sin))
    return rotations, np.searchsorted(np.unique(kinds), kinds)


def _pick(kinds: list, index: np.ndarray, layer: Int[Array, ""]):
    """The entry of `kinds` that a layer uses."""
    if len(kinds) == 1:
        return kinds[0]
    # A traced layer cannot index a Python list, so the kinds are stacked.
    which = jnp.asarray(index)[layer]
    return jax.tree.map(
        lambda *values: jax.lax.dynamic_index_in_dim(jnp.stack(values), which, keepdims=False),
        *kinds,
    )


def alibi(config: ModelConfig, position_BS: Int[Array, "B S"]) -> Float[Array, "B H S"]:
    """ALiBi's bias on the scores of each key: the head's slope times the key's position.

    Press et al. 2022 also subtract the query's position. Softmax cancels that constant.
    """
    position = position_BS[..., None, :].astype(config.acc)
    slope = over(jnp.asarray(slopes(config.n_heads), config.acc)[:, None], position)
    if not config.falcon_alibi:
        return slope * position
    # Falcon's own code computes this bias in bfloat16, so the rounding is part of the model.
    return _bfloat16(_bfloat16(slope) * _bfloat16(position))


def _bfloat16(x: Array) -> Array:
    """Rounds to bfloat16. XLA may drop the rounding of an `astype` there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def slopes(n_heads: int) -> np.ndarray:
    """`[H]`, ALiBi's slopes: a geometric sequence if H is a power of two, else some between."""
    # The largest power of two of heads gets the paper's slopes. The other heads get every second
    # slope of a sequence twice as long, as the paper's authors do.
    power = 2 ** math.floor(math.log2(n_heads))
    first = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * (n_heads - power) + 1, 2))
    return np.concatenate([first, between])
