"""GradDrop against gradients of forwards in which one layer's writes are constants."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Logit, run
from arrakis_jax.attribution.residual_gradients import target_value
from arrakis_jax.forward.targets import checked_target
from arrakis_jax.patching.attribution_patching import attribution_patching
from arrakis_jax.patching.qk_fix import qk_effects
from tests.cost import dots, flops
from tests.models import chosen, close, gpt2_small, model
from tests.patching.cells import (
    ALL,
    OVER,
    TARGET,
    VARIANTS,
    alone_and_padded,
    at,
    by_hand,
    pair_of,
    sites_of,
)

STAR = dict(method="atp_star", grad_drop=True)


def held_layer(m, clean, corrupt, mask, sites):
    """By site, effects with the writes of each layer held: `[L+1,...]`, the last with none."""
    base, source = (run(m, t, mask=mask, capture=ALL).residuals for t in (clean, corrupt))
    target = checked_target(m, jnp.asarray(clean), TARGET, jnp.asarray(mask))
    x = m.embed(jnp.asarray(clean), mask=mask)
    inside = [s for s in sites if s != "resid_post"]
    zeros = {site: jnp.zeros(getattr(base, site).shape) for site in inside}
    zeros["resid_post"] = jnp.zeros(base.resid_pre.shape)

    def slopes(held):
        def hold(site, layer, value):
            if site not in ("attn_out", "mlp_out"):
                return value
            return jnp.where(layer == held, jax.lax.stop_gradient(value), value)

        def total(taps):
            return target_value(m, x, jnp.asarray(mask), target, taps=taps, edits=(hold,))[0].sum()

        found = jax.grad(total)(zeros)
        fixed = {site: getattr(source, site) for site in ("q", "k")}
        return found, qk_effects(m, base, found["z"], fixed, jnp.asarray(mask))

    slope, fixed = jax.jit(lambda runs: jax.lax.map(slopes, runs))(jnp.arange(len(zeros["z"]) + 1))
    return {
        site: np.stack([
            by_hand(site, np.asarray(fixed[site][run])) if site in fixed
            else by_hand(site, np.asarray(slope[site][run]) * (at(source, site) - at(base, site)))
            for run in range(len(zeros["z"]) + 1)
        ])
        for site in sites
    }  # fmt: skip


@pytest.mark.parametrize("variant", chosen(VARIANTS, VARIANTS[1:2]), ids=lambda v: v["variant"])
def test_all_layers_at_once_are_one_at_a_time(variant, x64):
    m = model(**variant, dtype="float64")
    clean, corrupt, mask = pair_of()
    sites = sites_of(m)
    over = tuple(a for a in OVER if a != "neuron" or "mlp_act" in sites)
    found = attribution_patching(
        m, clean, corrupt, TARGET, sites=sites, over=over, mask=mask, **STAR
    )
    wanted = held_layer(m, clean, corrupt, mask, sites)
    for site in sites:
        *held, plain = wanted[site]
        close(found.effects[site], plain, 1e-12, site)
        close(found.screening[site], np.abs(held).sum(0) / 2, 1e-12, site)
    if variant["variant"] != "shared_norm":
        return
    without = attribution_patching(
        m, clean, corrupt, TARGET, sites=("k", "pattern"), over=("layer", "head"), mask=mask, **STAR
    )
    for site in ("k", "pattern"):  # signs cancel along positions, and not between layers
        close(without.effects[site], wanted[site][-1].sum(1), 1e-12, site)
        close(without.screening[site], np.abs(wanted[site][:-1].sum(2)).sum(0) / 2, 1e-12, site)
    alone = attribution_patching(
        m, clean, corrupt, TARGET, sites=("k", "pattern"), mask=mask, method="atp_star"
    )
    jax.tree.map(lambda a, b: close(a.sum(1), b, 1e-12), alone.effects, without.effects)
    assert alone.screening is None


def test_of_two_layers(x64):
    """G14: nodes of the last layer are themselves once, from the run that holds the first."""
    m = model("gpt2", dtype="float64", n_layers=2)
    clean, corrupt, mask = pair_of()
    sites = ("q", "z", "mlp_out", "final")
    found = attribution_patching(m, clean, corrupt, TARGET, sites=sites, mask=mask, **STAR)
    for site in sites[:-1]:
        close(found.screening[site][1], np.abs(found.effects[site][1]), 1e-12, site)
    close(found.screening["final"], 2 * np.abs(found.effects["final"]), 1e-12)


def test_effects_that_cancel(x64):
    """What layer 0 writes along d, layer 1 takes away again; the screening score shows it."""
    m = model("attention_only", dtype="float64", n_layers=2, d_mlp=3, norm=None, norm_eps=None)
    rng = np.random.default_rng(0)
    d = rng.normal(size=20)
    d /= np.linalg.norm(d)
    for parameter, change in (
        (m.blocks.attn.w_o, lambda w: 0 * w),
        (m.blocks.attn.b_o, lambda w: 0 * w),
        (m.blocks.mlp.w_out, lambda w: np.stack([w[0] @ np.outer(d, d), -np.outer([1, 0, 0], d)])),
        (m.blocks.mlp.w_in, lambda w: np.stack([w[0], np.outer(d, [1, 0, 0])])),
        (m.w_e, lambda w: w - np.outer(w @ d, d)),
        (m.w_u, lambda w: np.outer(d, np.arange(31) == 3)),
    ):
        parameter[...] = jnp.asarray(change(np.asarray(parameter[...])))
    clean, corrupt, mask = pair_of()
    found = attribution_patching(
        m, clean, corrupt, Logit(3), sites="mlp_out", over="layer", mask=mask, **STAR
    )
    base, source = (run(m, t, mask=mask, capture=ALL).residuals for t in (clean, corrupt))
    last = [np.flatnonzero(row)[-1] for row in mask]
    change = ((at(source, "mlp_out") - at(base, "mlp_out"))[0] @ d)[np.arange(2), last]
    assert np.abs(change).min() > 0.01
    np.testing.assert_allclose(found.effects[0], 0, atol=1e-12)
    close(found.screening[0], np.abs(change), 1e-12)


@pytest.mark.exhaustive
def test_padding_changes_nothing(x64):
    m = model("both", dtype="float64")
    alone_and_padded(m, 1e-10, sites=("resid_mid", "z", "mlp_act", "k"), **STAR)


def conditional(jaxpr, times=1):
    """Operations of products in the branches of conditions."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for part in jax.tree.leaves(
            tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            part = getattr(part, "jaxpr", part)
            if eqn.primitive.name == "cond" and hasattr(part, "eqns"):
                for product, often in dots(part, inner):
                    left, _ = (v.aval.shape for v in product.invars)
                    summed = product.params["dimension_numbers"][0][0]
                    size = math.prod(product.outvars[0].aval.shape)
                    total += 2 * often * size * math.prod(left[i] for i in summed)
            elif hasattr(part, "eqns"):
                total += conditional(part, inner)
    return total


def test_cost_in_forwards():
    """Of GPT-2 small; a run counts only from its own layer down, as far as it differs."""
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    n_layers = m.config.n_layers
    sites = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "q", "k", "v", "z", "mlp_act")

    def tool(m, t):
        return attribution_patching(m, t, t, TARGET, sites=sites, over=OVER, **STAR)

    forward = flops(lambda m, t: m(t, capture=("resid_pre",)), m, tokens)
    written = flops(tool, m, tokens) / forward
    runs = conditional(jax.make_jaxpr(tool)(m, tokens).jaxpr) / forward
    run = runs * (n_layers + 1) / (2 * n_layers)
    assert written <= n_layers + 5.1
    assert written - runs + run <= n_layers
