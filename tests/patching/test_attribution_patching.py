"""Attribution patching against gradients times differences, exact patches, and known answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import KL, AtP, AtPStar, Capture, Logit, residual_gradients, run
from arrakis_jax.patching.attribution_patching import attribution_patching
from arrakis_jax.stream.edits import HEAD_SITES
from arrakis_jax.stream.fields import UNSTACKED
from tests.cost import flops
from tests.models import chosen, close, compilations, gpt2_small, model
from tests.patching.cells import (
    ALL,
    OVER,
    TARGET,
    VARIANTS,
    alone_and_padded,
    at,
    by_hand,
    exact,
    pair_of,
    sites_of,
)


@pytest.mark.parametrize("variant", chosen(VARIANTS, VARIANTS[2:]), ids=lambda v: v["variant"])
def test_effects_at_all_sites_are_gradients_times_differences(variant, x64):
    """Which are tested against finite differences; padding with garbage ids, grouped heads."""
    m = model(**variant, dtype="float64")
    clean, corrupt, mask = pair_of()
    sites = sites_of(m)
    over = tuple(a for a in OVER if a != "neuron" or "mlp_act" in sites)
    found = attribution_patching(m, clean, corrupt, TARGET, sites=sites, over=over, mask=mask)
    base, source = (run(m, t, mask=mask, capture=ALL).residuals for t in (clean, corrupt))
    slope = residual_gradients(m, clean, 3, against=4, mask=mask, capture=ALL)
    for site in sites:
        wanted = by_hand(site, at(slope, site) * (at(source, site) - at(base, site)))
        close(found.effects[site], wanted, 1e-12, site)
    logits = run(m, clean, mask=mask, capture=Capture(("logits",), positions=(-1,))).logits[:, 0]
    close(found.base, logits[:, 3] - logits[:, 4], 1e-12)
    assert len(found.labels) == len(found.terms) == sum(e[..., 0].size for e in
                                                        found.effects.values())  # fmt: skip
    cell = found.labels[len(found.terms) - 1]
    assert cell.site == sites[-1] and (cell.neuron is not None) == ("mlp_act" in sites)


def test_a_gate_is_a_patch_by_degrees(x64):
    """Its slope by central differences of the patch itself, opened a little."""
    m = model("llama3", dtype="float64")
    clean, corrupt, mask = pair_of()
    base, source = (run(m, t, mask=mask, capture=ALL).residuals for t in (clean, corrupt))
    found = attribution_patching(m, clean, corrupt, TARGET, sites="k", mask=mask)
    change = 1e-5 * (source.k - base.k)
    above, below = (exact(m, clean, mask, base.k + s * change, site="k") for s in (1, -1))
    np.testing.assert_allclose(found.effects, (above - below) / 2e-5, rtol=1e-6, atol=1e-9)


def test_a_linear_model_is_patched_exactly(x64):
    """G8: uniform attention, no norm, no activation: also over fewer axes, and with any patch."""
    m = model("attention_only", dtype="float64", norm=None, norm_eps=None, d_mlp=7, positions=None,
              rope_theta=None)  # fmt: skip
    m.blocks.attn.w_q[...] = jnp.zeros_like(m.blocks.attn.w_q[...])
    clean, corrupt, mask = pair_of()
    source = run(m, corrupt, mask=mask, capture=ALL).residuals
    sites = ("embed", "mlp_out", "v", "z")
    found = attribution_patching(m, clean, corrupt, TARGET, sites=sites, mask=mask)
    assert found.labels.over == found.over and found.method == "atp"
    for site in sites:
        wanted = np.asarray(exact(m, clean, mask, getattr(source, site), site=site))
        wanted = wanted[0] if site in UNSTACKED else wanted
        wanted = wanted if site in HEAD_SITES else wanted[..., 0, :]
        close(found.effects[site], wanted, 1e-10, site)
    line = attribution_patching(m, clean, corrupt, TARGET, sites=sites, mask=mask, steps=3)
    assert line.method.startswith("atp, the mean over")
    jax.tree.map(lambda a, b: close(a, b, 1e-10), line.effects, found.effects)
    close(line.base, found.base, 1e-12)
    close(found.effects["embed"].sum(0), found.source - found.base, 1e-10)
    for patch in ("zero", "mean"):
        value = np.zeros_like(source.z)
        if patch == "mean":
            value += np.asarray(source.z)[:, mask].mean(1)[:, None, None]
        put = attribution_patching(
            m, clean, None if patch == "zero" else corrupt, TARGET, sites="z", patch=patch,
            mask=mask,
        )  # fmt: skip
        close(put.effects, exact(m, clean, mask, value, site="z"), 1e-10, patch)
        assert put.source is None and put.patch == patch


def test_one_site_at_a_time_and_the_other_way_round(x64):
    m = model("gpt2", dtype="float64")
    clean, corrupt, mask = pair_of()
    sites = ("mlp_act", "resid_post", "resid_pre", "final", "z")
    how = dict(sites=sites, over=OVER, mask=mask)
    together = attribution_patching(m, clean, corrupt, TARGET, **how)
    effects = together.effects
    for site, over, spec in (
        ("z", ("head", "layer"), "lphb->hlb"),
        ("mlp_act", "neuron", "lpnb->nb"),
        ("final", (), "pb->b"),
    ):
        one = attribution_patching(m, clean, corrupt, TARGET, sites=site, over=over, mask=mask)
        close(one.effects, np.einsum(spec, effects[site]), 1e-12, site)
    close(effects["resid_post"][:-1], effects["resid_pre"][1:], 1e-12)
    close(effects["resid_post"][-1], effects["final"], 1e-12)
    swapped = attribution_patching(m, corrupt, clean, TARGET, base="corrupt", **how)
    jax.tree.map(np.testing.assert_array_equal, swapped.effects, effects)
    same = attribution_patching(m, clean, clean, TARGET, **how)
    assert max(np.abs(x).max() for x in same.effects.values()) < 1e-12  # two programs' rounding


def test_averaged_gradients_are_complete(x64):
    """Against a loop; with more pieces the embedding's effects sum to the target's change."""
    m = model("llama", dtype="float64")
    clean, corrupt, mask = pair_of()
    steps = 400
    found = attribution_patching(
        m, clean, corrupt, TARGET, sites=("embed", "z"), steps=steps, mask=mask
    )
    close(found.effects["embed"].sum(0), found.source - found.base, 1e-4)
    base, source = (run(m, t, mask=mask, capture=ALL).residuals for t in (clean, corrupt))
    last = Capture(("logits",), positions=(-1,))

    def total(tap, along):
        x = base.embed + along * (source.embed - base.embed)
        logits = m.after_embedding(x, mask=mask, taps={"z": tap}, capture=last).logits
        return (logits[:, 0, 3] - logits[:, 0, 4]).sum()

    slope = jax.jit(jax.grad(total))
    points = (np.arange(steps) + 0.5) / steps
    mean = sum(np.asarray(slope(jnp.zeros_like(base.z), a)) for a in points) / steps
    close(found.effects["z"], by_hand("z", mean * (at(source, "z") - at(base, "z"))), 1e-12)


def test_padding_changes_nothing(x64):
    sites = ("resid_pre", "z", "pattern", "q", "k")
    alone_and_padded(model("both", dtype="float64"), 1e-10, method="atp_star", sites=sites)


@pytest.mark.exhaustive
def test_padding_changes_nothing_in_float32():
    alone_and_padded(model("gpt2"), 1e-4, sites=("resid_pre", "z", "mlp_out"))


def test_new_targets_and_tokens_do_not_compile():
    m = model("gpt2")
    clean, corrupt, mask = pair_of()
    first = attribution_patching(m, clean, corrupt, TARGET, mask=mask)
    with compilations() as names:
        again = attribution_patching(m, corrupt, clean, Logit(7, against=1, position=-2), mask=mask)
    assert not any("attribution_patching" in name for name in names), names
    assert first.effects["z"].shape == again.effects["z"].shape == (3, 7, 6, 2)
    assert set(again.effects) == {"resid_pre", "attn_out", "mlp_out", "z"}
    assert again.effects["z"].dtype == jnp.float32
    assert len(again.to_table(2)["cell"]) == 4
    assert again.mean().mean["z"].shape == (3, 7, 6)


def test_cost_in_forwards():
    """All nodes of GPT-2 small, 8 x 128 tokens; without the unembedding."""
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    forward = flops(lambda m, t: m(t, capture=("resid_pre",)), m, tokens)
    sites = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "q", "k", "v", "z", "mlp_act")

    def cost(**how):
        return flops(
            lambda m, t: attribution_patching(m, t, t, TARGET, sites=sites, over=OVER, **how),
            m, tokens,
        ) / forward  # fmt: skip

    assert 2.9 < cost() <= 3.1
    assert cost(method="atp_star") <= 3.2
    assert cost(steps=5) <= 2 + 2.1 * 5


def test_what_is_refused():
    m, (clean, corrupt, mask) = model("gpt2"), pair_of()
    patching = functools.partial(attribution_patching, m, clean, corrupt, TARGET, mask=mask)
    for how, message in (
        (dict(method="exact"), "`method` must be one of"),
        (dict(sites=("z", "router")), "`sites` must be made of"),
        (
            dict(sites="resid_pre", over="head"),
            "`over` must be axes of site 'resid_pre', got 'head'",
        ),
        (dict(over=("layer", "neuron")), "`over` must be axes of one of .*, got 'neuron'"),
        (dict(steps=0), "`steps` must be an int"),
        (dict(steps=2, patch="zero"), "`steps` must be None"),
        (dict(steps=2, method="atp_star"), "`steps` must be None"),
        (dict(grad_drop=True), "`grad_drop` must be False, got True with method='atp'"),
        (
            dict(grad_drop=True, method="atp_star", over="position"),
            "`over` must be with 'layer' for grad_drop",
        ),
        (dict(sites="pattern", over="layer", patch="mean"), "`sites` must be without 'pattern'"),
    ):
        with pytest.raises(ValueError, match=message):
            patching(**how)
    with pytest.raises(ValueError, match="`grad_drop` must be False, got True with a model of one"):
        attribution_patching(
            model("one_layer"), clean, corrupt, 3, mask=mask, method="atp_star", grad_drop=True
        )
    with pytest.raises(ValueError, match="`sites` must be made of"):
        attribution_patching(model("moe"), clean, corrupt, 3, sites="mlp_act", mask=mask)


def test_divergence_has_no_slope_at_its_reference(x64):
    m = model("llama", dtype="float64")
    clean, corrupt, mask = pair_of()
    reference = run(m, clean, mask=mask, capture=Capture(("logits",), positions=(-1,))).logits[:, 0]
    noising = attribution_patching(m, clean, corrupt, KL(reference), sites="z", mask=mask)
    denoising = attribution_patching(
        m, clean, corrupt, KL(reference), sites="z", mask=mask, base="corrupt"
    )
    assert np.abs(noising.effects).max() < 1e-12 < 1e-3 < np.abs(denoising.effects).max()


def test_a_method_as_a_value_is_its_name_with_options():
    m, (clean, corrupt, mask) = model("gpt2"), pair_of()
    patching = functools.partial(attribution_patching, m, clean, corrupt, TARGET, mask=mask)
    for value, options in (
        (AtP(), dict(method="atp")),
        (AtP(steps=2), dict(method="atp", steps=2)),
        (AtPStar(), dict(method="atp_star")),
        (AtPStar(grad_drop=True), dict(method="atp_star", grad_drop=True)),
    ):
        by_value, by_name = patching(method=value), patching(**options)
        assert by_value.method == by_name.method
        jax.tree.map(np.testing.assert_array_equal, by_value, by_name)
    for function, error, message in [
        (lambda: AtP(steps=0), ValueError, "`steps` must be an int"),
        (lambda: AtP(grad_drop=True), TypeError, "grad_drop"),
        (lambda: AtPStar(grad_drop="no"), TypeError, "`grad_drop` must be True or False, got 'no'"),
        (lambda: patching(method=AtP(steps=2), patch="zero"), ValueError, "`steps` must be None"),
        (lambda: patching(method=AtP(), steps=2), ValueError, r"write method=AtP\(steps=...\)"),
        (lambda: patching(method=AtPStar(), steps=2), ValueError, "it has no such option"),
        (lambda: patching(method=AtPStar), ValueError, "`method` must be one of"),
    ]:
        with pytest.raises(error, match=message):
            function()
