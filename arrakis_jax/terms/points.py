"""Points of the stream at which sums of terms end or begin."""

from typing import Any

import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Int
from arrakis_jax.core.checks import checked_layer
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.stream.padding import Padding
from arrakis_jax.stream.residuals import ResidualStream
from arrakis_jax.terms.capture import WHOLE

POINTS = ("resid_pre", "resid_mid", "resid_post")


def checked_point(at: Any, config: ModelConfig, name: str = "at") -> tuple[int, int]:
    """How many layers' attention and MLP are written before the point `at`."""
    n_layers = config.n_layers
    if at == "final":
        return n_layers, n_layers
    if not (isinstance(at, tuple) and len(at) == 2 and at[0] in POINTS):
        must, do = f"'final' or ({POINTS}, layer)", "such as ('resid_post', 3)"
        raise ValueError(expected(name, must, repr(at), do))
    if config.parallel and at[0] == "resid_mid":
        do = "attention and MLP of a parallel block write at once; use resid_post"
        raise ValueError(expected(name, "a point that the model has", repr(at), do))
    layer = checked_layer(at[1], n_layers, name="layer")
    if not isinstance(layer, int):
        do = "the number of terms depends on it; use residual_decomposition for a traced layer"
        raise TypeError(expected("layer", "an int", "a traced value", do))
    return layer + (at[0] != "resid_pre"), layer + (at[0] == "resid_post")


def located(
    stream: ResidualStream, positions: tuple[int, ...] | None, by: str
) -> tuple[ResidualStream, Int[Array, "... T"]]:
    """The stream at these positions, and how many real tokens stand before each of them."""
    stream.need("mask")
    padding = Padding.of(stream.mask.shape, stream.mask)
    positions = stream.positions if positions is None else positions
    if positions is None:
        return stream, padding.rank
    return stream.at(positions, whole=WHOLE.get(by, ())), padding.counted(jnp.array(positions, int))
