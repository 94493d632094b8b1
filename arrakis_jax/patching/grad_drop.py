"""GradDrop: effects with one layer's writes held fixed, for each layer, in one backward sweep.

Effects of a node through different layers may cancel. Holding each layer in turn lets the rest be
seen. There are L such runs, and the base run, in which no layer is held. Their cotangents go down
through the layers together: each block is linearised once, at the stream that entered it. A run's
cotangent is the base run's own until its layer comes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.core.axes import Array, Float
from arrakis_jax.forward.targets import Target, read_target
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.site import Sites
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Place, walk
from arrakis_jax.patching.gates import Gate, openings_of, together, with_openings
from arrakis_jax.patching.qk_fix import QKV_FIELDS, layer_effects
from arrakis_jax.stream.fields import UNSTACKED
from arrakis_jax.stream.padding import Padding

WRITES = ("attn_out", "mlp_out")

_BySite = dict[str, Array]  # effects
# From the cotangent behind a block, and what its writes pass on, to that before it, and effects.
_Back = Callable[[Array, Array], tuple[Array, _BySite]]

# A layer is held in a run by multiplying the cotangents of its writes by p = 0, and by p = 1 in all
# other runs. The block is linearised once for all runs, so p is not known forwards; it comes in
# backwards, as the cotangent of a second output that is the constant 1 forwards:
#     (w, 1) = _passing(w, 1),    cotangent of w  <-  cotangent of w * cotangent of the 1.


@jax.custom_vjp
def _passing(value: Array, passes: Array) -> tuple[Array, Array]:
    """Identity forwards. Backwards, `value`'s cotangent is multiplied by the one of `passes`."""
    return value, passes


def _passing_forward(value: Array, passes: Array) -> tuple[tuple[Array, Array], None]:
    return (value, passes), None


def _passing_backward(_: None, cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
    value, passes = cotangents
    return value * passes.astype(value.dtype), passes


_passing.defvjp(_passing_forward, _passing_backward)


def dropped_effects(
    model: Transformer,
    x_BTD: Float[Array, "B T D"],
    mask: Array | None,
    target: Target,
    gates: dict[str, Gate],
    source: dict[str, Array],
    over: tuple[str, ...],
) -> tuple[Array, _BySite, _BySite]:
    """Each row's target, and by site first-order effects and their GradDrop magnitudes.

    Sites are the gates', and "q" and "k" if in `source`, where softmax is taken as it is. Effects
    are `[L,B,...]`, already summed along the axes that are not in `over`.
    """
    n_layers = model.config.n_layers
    padding = Padding.of(x_BTD.shape[:2], mask)
    base = model.after_embedding(x_BTD, mask=mask, capture=("resid_pre", "final")).residuals
    value_B, pull = jax.vjp(lambda x: read_target(model, x, mask, target), base.final)
    final_BTD = pull(jnp.ones_like(value_B))[0]

    # The cotangents of the base run and of the L others; at the end they are all equal.
    at_final = (final_BTD, jnp.broadcast_to(final_BTD, (n_layers, *final_BTD.shape)))
    inside = {site: gate for site, gate in gates.items() if site not in UNSTACKED}
    sweep = _Sweep(model, AttentionContexts.of(model.config, padding), padding, over)
    walked = walk(model, sweep.layer, at_final, (base.resid_pre, inside, source), reverse=True)

    effects, magnitudes = walked.found
    ends = {"embed": (x_BTD, walked.state), "final": (base.final, at_final)}
    for site, (value, cotangents) in ends.items():
        if site in gates:
            effects[site], magnitudes[site] = _at_end(gates[site], value, *cotangents)
    return value_B, effects, {site: x / (n_layers - 1) for site, x in magnitudes.items()}


@dataclass(frozen=True)
class _Sweep:
    """The sweep down through the layers, with the cotangents of all runs.

    Attributes:
        over: the axes of cells, along which effects are not summed.
    """

    model: Transformer
    contexts: AttentionContexts
    padding: Padding
    over: tuple[str, ...]

    def layer(
        self, cotangents: tuple[Array, Array], place: Place, xs: tuple
    ) -> tuple[tuple[Array, Array], tuple[_BySite, _BySite]]:
        """From the cotangents behind a block to those before it, with its nodes' effects.

        The effects are the base run's, and their absolute values summed over the other runs.
        """
        base_BTD, runs_NBTD = cotangents
        acc, index = self.model.config.acc, place.index
        back = self.linearised(place, *xs)
        base_BTD, effects = back(base_BTD, jnp.ones((), acc))
        nothing = jax.tree.map(jnp.zeros_like, effects)

        def of_run(run: Array, x_BTD: Array) -> tuple[Array, _BySite]:
            return back(x_BTD, (run != index).astype(acc))

        def add(total: _BySite, xs: tuple) -> tuple[_BySite, Array]:
            in_base = (base_BTD, nothing)
            x_BTD, effects = jax.lax.cond(xs[0] >= index, of_run, lambda *_: in_base, *xs)
            return jax.tree.map(lambda a, e: a + jnp.abs(e), total, effects), x_BTD

        # In the runs of the `index` layers below, nothing differs from the base run yet.
        below = jax.tree.map(lambda e: index * jnp.abs(e), effects)
        runs = jnp.arange(self.model.config.n_layers)
        total, runs_NBTD = jax.lax.scan(add, below, (runs, runs_NBTD))
        return (base_BTD, runs_NBTD), (effects, total)

    def linearised(
        self, place: Place, x_BTD: Array, gates: dict[str, Gate], source: dict[str, Array]
    ) -> _Back:
        """The block's way back, from one forward at the stream that entered it."""
        config, (block, index, _) = self.model.config, place
        context = self.contexts.at(index)

        def forward(x_BTD: Array, openings: dict, z: Array | None) -> tuple[tuple, dict]:
            passes = {}

            def hold(site: str, _: Any, value: Array) -> Array:
                if site in WRITES:
                    value, passes[site] = _passing(value, jnp.ones((), config.acc))
                return value

            taps = with_openings(gates, openings, z)
            capture = frozenset(QKV_FIELDS if source else ())
            sites = Sites(capture, taps, (hold,), index, self.padding.mask)
            return (block(x_BTD, context, index, sites), passes), sites.records

        z_shape = (*x_BTD.shape[:2], config.n_heads, config.d_head)
        z_BTHK = jnp.zeros(z_shape, config.acc) if source else None
        (_, passes), pull, qkv = jax.vjp(forward, x_BTD, openings_of(gates), z_BTHK, has_aux=True)

        def back(x_BTD: Array, through: Array) -> tuple[Array, _BySite]:
            x_BTD, effects, g_BTHK = pull((x_BTD, dict.fromkeys(passes, through)))
            if source:
                at_qk = layer_effects(block.attn, context, index, qkv, g_BTHK, source)
                effects = effects | at_qk
            return x_BTD, {site: together(site, e, self.over) for site, e in effects.items()}

        return back


def _at_end(gate: Gate, value: Array, base: Array, runs: Array) -> tuple[Array, Array]:
    """The effects at a site outside of the layers, and their absolute values over all runs."""
    _, slope = jax.vjp(lambda opening: replace(gate, opening=opening)(value), gate.opening)
    return slope(base)[0], jnp.abs(jax.vmap(slope)(runs)[0]).sum(0)
