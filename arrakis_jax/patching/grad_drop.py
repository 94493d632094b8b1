"""GradDrop: effects with one layer's writes held fixed, for each layer, in one backward sweep.

Effects of a node through different layers may cancel. Held fixed in turn, each layer lets the rest
be seen. The cotangents of all these runs go down through the layers together: each block is
linearised once, at the stream that entered it, and a run is the base's own until its layer comes.
"""

from dataclasses import replace
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


@jax.custom_vjp
def _passing(value: Array, passes: Array) -> tuple[Array, Array]:
    """Both as they are; the cotangent of the value is multiplied by that of `passes`."""
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
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Each row's target, and by site first-order effects and their GradDrop magnitudes.

    At gates, and with the fix at the "q" and "k" in `source`. Effects are `[L,B,...]`, already
    summed along the axes that are not in `over`.
    """
    config = model.config
    n_layers = config.n_layers
    padding = Padding.of(x_BTD.shape[:2], mask)
    contexts = AttentionContexts.of(config, padding)
    base = model.after_embedding(x_BTD, mask=mask, capture=("resid_pre", "final")).residuals
    value_B, pull = jax.vjp(lambda x: read_target(model, x, mask, target), base.final)
    final_BTD = pull(jnp.ones_like(value_B))[0]
    inside = {site: gate for site, gate in gates.items() if site not in UNSTACKED}

    def of_layer(carry: tuple, place: Place, xs: tuple) -> tuple[tuple, tuple]:
        """From cotangents behind a block to those before it, with what the layer's nodes do."""
        (block, layer, _), (x_BTD, gates, source) = place, xs
        context = contexts.at(layer)

        def forward(x_BTD: Array, openings: dict, z: Array | None) -> tuple[tuple, dict]:
            passes = {}

            def hold(site: str, _: Any, value: Array) -> Array:
                if site in WRITES:
                    value, passes[site] = _passing(value, jnp.ones((), config.acc))
                return value

            taps = with_openings(gates, openings, z)
            capture = frozenset(QKV_FIELDS if source else ())
            here = Sites(capture, taps, (hold,), layer, padding.mask)
            return (block(x_BTD, context, layer, here), passes), here.records

        shape = (*x_BTD.shape[:2], config.n_heads, config.d_head)
        z_BTHK = jnp.zeros(shape, config.acc) if source else None
        (_, passes), pull, read = jax.vjp(forward, x_BTD, openings_of(gates), z_BTHK, has_aux=True)

        def of_run(run: Array, x_BTD: Array) -> tuple[Array, dict[str, Array]]:
            """Of the run in which this layer is held; of the base run for one of no layer."""
            through = (run != layer).astype(config.acc)
            x_BTD, effects, g_BTHK = pull((x_BTD, dict.fromkeys(passes, through)))
            if source:
                effects = effects | layer_effects(block.attn, context, layer, read, g_BTHK, source)
            return x_BTD, {site: together(site, e, over) for site, e in effects.items()}

        plain_BTD, runs_NBTD = carry
        plain_BTD, plain = of_run(jnp.array(-1), plain_BTD)

        def add(total: dict[str, Array], xs: tuple) -> tuple[dict[str, Array], Array]:
            nothing = jax.tree.map(jnp.zeros_like, plain)
            x_BTD, effects = jax.lax.cond(
                xs[0] >= layer, of_run, lambda *_: (plain_BTD, nothing), *xs
            )
            return jax.tree.map(lambda a, e: a + jnp.abs(e), total, effects), x_BTD

        # In the runs of layers below, nothing differs from the base run yet.
        below = jax.tree.map(lambda e: layer * jnp.abs(e), plain)
        total, runs_NBTD = jax.lax.scan(add, below, (jnp.arange(n_layers), runs_NBTD))
        return (plain_BTD, runs_NBTD), (plain, total)

    carry = first = (final_BTD, jnp.broadcast_to(final_BTD, (n_layers, *final_BTD.shape)))
    walked = walk(model, of_layer, carry, (base.resid_pre, inside, source), reverse=True)
    carry, (effects, total) = walked.state, walked.found

    behind = {"embed": (x_BTD, *carry), "final": (base.final, *first)}
    for site in set(gates) & set(behind):
        value, plain, runs = behind[site]
        gate = gates[site]
        _, slope = jax.vjp(lambda o, g=gate, v=value: replace(g, opening=o)(v), gate.opening)
        effects[site] = slope(plain)[0]
        total[site] = jnp.abs(jax.vmap(slope)(runs)[0]).sum(0)
    return value_B, effects, {site: x / (n_layers - 1) for site, x in total.items()}
