"""Gates: taps that move a value toward another run's. The slope of a closed gate is the effect.

The backward pass returns these slopes alone, already summed over what is patched together. The
gradient and the difference of the runs meet at the site, and neither is kept for all layers.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.patching.effects import axes_of
from arrakis_jax.patching.pairs import fields_of
from arrakis_jax.patching.patch_sweep import site_axis
from arrakis_jax.stream.fields import UNSTACKED


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gate:
    """`value + opening (source - value)`: the value itself closed (0), the source's open (1).

    At 0 the derivative with respect to `opening` is `gradient . (source - value)`, summed over
    the axes along which `opening` is 1 long.

    Attributes:
        opening: `[L,B,...]`, or without L at "embed" and "final".
        source: what is put in place, `[L,B,...]` or `[L]`.
        base: what is subtracted from the source; None for the value itself.
        added: a zero added to the value first, whose gradient is the site's; or None.
    """

    opening: Array
    source: Array
    base: Array | None = None
    added: Array | None = None

    def __call__(self, value: Array) -> Array:
        """The value, moved toward the source."""
        # The difference is taken in float32 or wider, and rounded only when it is added.
        acc = self.opening.dtype
        value = value if self.added is None else value + self.added.astype(value.dtype)
        base = value if self.base is None else self.base
        change = self.opening * (self.source.astype(acc) - base.astype(acc))
        return value + change.astype(value.dtype)


def closed(
    model: Transformer, x_BTD: Array, values: dict[str, Array], over: tuple[str, ...]
) -> dict[str, Gate]:
    """Closed gates at these sites, with an opening for each cell and example."""
    sites = tuple(values)

    def forward(x_BTD: Array) -> dict[str, Array]:
        stream = model.after_embedding(x_BTD, capture=fields_of(sites)).residuals
        return {site: getattr(stream, site) for site in sites}

    def opening(site: str, shape: tuple[int, ...]) -> Array:
        # An axis is 1 long where cells are patched together: the slope sums over it, by broadcast.
        stacked = int(site not in UNSTACKED)
        kept = {0} | {stacked + axis for axis in _kept(site, over)}
        return jnp.zeros([n if i in kept else 1 for i, n in enumerate(shape)], model.config.acc)

    # Only shapes are needed, so the forward is not run.
    shapes = jax.eval_shape(forward, x_BTD)
    return {site: Gate(opening(site, shapes[site].shape), values[site]) for site in sites}


def _kept(site: str, over: tuple[str, ...]) -> set[int]:
    """The axes of a site's value, without L, that its effects keep: B, and those in `over`."""
    return {0} | {site_axis(site, axis) for axis in axes_of(site, over) if axis != "layer"}


def together(site: str, effects: Array, over: tuple[str, ...]) -> Array:
    """The effects of one layer `[B,...]`, summed (to length 1) along the axes not in `over`."""
    kept = _kept(site, over)
    return effects.sum([i for i in range(effects.ndim) if i not in kept], keepdims=True)


def arranged(site: str, effects: Array, over: tuple[str, ...]) -> Float[Array, "... B"]:
    """The effects `[L,B,...]` with an axis for each entry of `over` that the site has, then B."""
    stacked = int(site not in UNSTACKED)  # where B is, behind L
    wanted = [
        0 if axis == "layer" else stacked + site_axis(site, axis) for axis in axes_of(site, over)
    ]
    wanted.append(stacked)
    rest = [i for i in range(effects.ndim) if i not in wanted]
    # Axes in `over` first and B after them; the rest, of length 1 or not, is summed at the end.
    effects = jnp.transpose(effects, (*wanted, *rest))
    return effects.sum(tuple(range(len(wanted), effects.ndim)))


def with_openings(gates: dict[str, Gate], openings: dict[str, Array], z: Any) -> dict[str, Any]:
    """Taps: the gates opened so far, and at "z" an array added too, unless it is None."""
    taps: dict[str, Any] = {
        site: replace(gate, opening=openings[site]) for site, gate in gates.items()
    }
    if z is not None:
        taps["z"] = replace(taps["z"], added=z) if "z" in taps else z
    return taps


def openings_of(gates: dict[str, Gate]) -> dict[str, Array]:
    """The openings alone, which is what is differentiated."""
    return {site: gate.opening for site, gate in gates.items()}
