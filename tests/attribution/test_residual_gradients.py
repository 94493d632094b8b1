"""residual_gradients: every site in one backward pass, against one at a time and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Add, Capture, residual_gradients, run
from arrakis_jax.stream.fields import INTERNAL, SCALES, STREAM, UNSTACKED
from tests.models import VARIANTS, batch, chosen, close, compilations, model

SITES = (*STREAM, *INTERNAL)


def value(m, tokens, mask, edits, target=3, against=4):
    logits = run(m, tokens, mask=mask, edits=edits).logits
    last = logits[np.arange(len(tokens)), [np.flatnonzero(row)[-1] for row in mask]]
    return last[:, target] - last[:, against]


@pytest.mark.parametrize(
    "variant",
    chosen(["llama3", "gpt2", "both", "shared_norm", "stream_after", "moe", "gpt_oss"],
           ["moe"]),
)  # fmt: skip
def test_joint_taps_equal_finite_differences(variant, x64):
    """G11: the directional derivative at every site, by central differences."""
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch(lengths=(5, 3))
    found = residual_gradients(m, tokens, 3, against=4, mask=mask, capture="all")
    rng = np.random.default_rng(0)
    for site in SITES:
        if getattr(found, site) is None:
            assert site in found.lacks
            continue
        gradient = np.asarray(getattr(found, site))
        step = 1e-5 * rng.normal(size=gradient.shape)

        def at(sign, site=site, step=step):
            if site in UNSTACKED:
                edits = (Add(site, sign * step),)
            else:
                edits = tuple(Add(site, sign * step[i], layer=i) for i in range(3))
            return value(m, tokens, mask, edits)

        change = np.asarray(at(1) - at(-1)) / 2
        axes = tuple(i for i in range(gradient.ndim) if i != (0 if site in UNSTACKED else 1))
        expected = (gradient * step).sum(axes)
        np.testing.assert_allclose(change, expected, rtol=1e-6, atol=1e-11, err_msg=site)


@pytest.mark.parametrize("variant", chosen(VARIANTS, ["both", "stream_after"]))
def test_joint_equals_one_at_a_time(variant, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch(lengths=(5, 3))
    found = residual_gradients(m, tokens, 3, mask=mask)
    positions = [np.flatnonzero(row)[-1] for row in mask]
    for site in ("embed", "attn_out", "mlp_out", "resid_mid", "resid_pre", "final"):
        if getattr(found, site) is None:
            assert site in found.lacks
            continue

        def total(tap, site=site):
            logits = m(jnp.asarray(tokens), mask=mask, taps={site: tap}).logits
            return logits[jnp.arange(2), jnp.array(positions), 3].sum()

        one = jax.jit(jax.grad(total))(jnp.zeros(getattr(found, site).shape))
        close(getattr(found, site), one, 1e-12, site)


def test_fields_and_padding():
    m = model()
    tokens, mask, _ = batch()
    found = residual_gradients(m, tokens, 3, mask=mask, capture="all")
    assert all(getattr(found, name) is None for name in SCALES)
    assert found.pattern.shape == (3, 5, 6, 11, 11)
    for site in STREAM:
        assert not np.asarray(getattr(found, site))[..., ~mask, :].any(), site
    np.testing.assert_array_equal(found.attn_out, found.resid_mid)
    np.testing.assert_array_equal(found.mlp_out[:-1], found.resid_pre[1:])
    some = residual_gradients(m, tokens, 3, mask=mask, capture=("z", "final"))
    assert some.resid_pre is None
    close(some.z, found.z, 1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("variant", chosen(["gpt2", "moe"], ["gpt2"]))
def test_padded_equals_one_by_one(variant, side, x64):
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side=side, lengths=(7, 7, 4, 4, 1))
    targets = np.array([3, 30, 0, 7, 7])
    found = residual_gradients(m, tokens, targets, against=1, mask=mask, capture="all")
    for b, prompt in enumerate(prompts):
        alone = residual_gradients(m, prompt[None], targets[b], against=1, capture="all")
        for site in (s for s in SITES if s not in found.lacks):
            whole, one = np.asarray(getattr(found, site)), np.asarray(getattr(alone, site))
            row, one = (whole[b], one[0]) if site in UNSTACKED else (whole[:, b], one[:, 0])
            axis = {"pattern": 2, "embed": 0, "final": 0}.get(site, 1)
            row = np.compress(mask[b], row, axis)
            if site == "pattern":
                row = np.compress(mask[b], row, -1)
            np.testing.assert_allclose(row, one, atol=1e-10, err_msg=site)


def test_jit_vmap_and_one_compilation():
    m = model("gpt2")
    tokens, mask, _ = batch()
    plain = residual_gradients(m, tokens, 3, mask=mask).resid_pre
    jitted = jax.jit(lambda m, t: residual_gradients(m, t, 3, mask=mask).resid_pre)(m, tokens)
    close(jitted, plain, 1e-4)
    each = jax.vmap(lambda t, k: residual_gradients(m, t, 3, mask=k).resid_pre[:, 0])(
        jnp.asarray(tokens)[:, None], jnp.asarray(mask)[:, None]
    )
    close(np.moveaxis(each, 0, 1), plain, 1e-4)
    with compilations() as names:
        residual_gradients(m, tokens, np.arange(5), mask=mask, position=0)
    assert names == []


def test_a_capture_selects_layers_and_positions():
    m = model()
    tokens, mask, _ = batch()
    whole = residual_gradients(m, tokens, 3, mask=mask)
    chosen = Capture(("resid_pre", "final"), layers=(-1, 0), positions=(-1,))
    some = residual_gradients(m, tokens, 3, mask=mask, capture=chosen)
    assert some.layers == (0, 2) and some.resid_pre.shape == (2, 5, 1, 20)
    for b, row in enumerate(mask):
        last = np.flatnonzero(row)[-1]
        close(some.resid_pre[:, b, 0], whole.resid_pre[np.array([0, 2]), b, last], 1e-5)
        close(some.final[b, 0], whole.final[b, last], 1e-5)


def test_bad_input():
    m = model()
    tokens = np.arange(4)[None]
    for call, error, message in [
        (lambda: residual_gradients(m, tokens, 31), ValueError, r"in \[0, 31\), got \[31\]"),
        (lambda: residual_gradients(m, tokens, 3, position=4), IndexError, r"\[-4, 4\), got \[4\]"),
        (lambda: residual_gradients(m, tokens, 3, capture="some"), ValueError, "must be one of"),
        (lambda: residual_gradients(m, tokens, 3, capture=("zz",)), ValueError, "must be made of"),
        (lambda: residual_gradients(m, run(m, tokens), 3), TypeError, "got ModelOutput; this runs"),
    ]:
        with pytest.raises(error, match=message):
            call()
