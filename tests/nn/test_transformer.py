"""The forward: identities, padding, capture, taps, edits, resume; parity is in tests/families."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import (
    Add,
    Capture,
    NotCapturedError,
    Project,
    Replace,
    RopeScaling,
    Scale,
    Set,
    Transformer,
    resume,
    run,
)
from arrakis_jax.stream.fields import FIELDS, SCALES, UNSTACKED
from tests.models import (
    LLAMA3,
    VARIANTS,
    batch,
    built,
    chosen,
    close,
    compilations,
    config,
    model,
)

# Those whose heads write as they are; tests/decomposition has the identities of the others.
PLAIN = [v for v in VARIANTS if not {"norm_placement", "moe_layers"} & VARIANTS[v].keys()]


@pytest.mark.parametrize("variant", PLAIN)
def test_every_write_is_added_to_the_stream(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    r = run(m, tokens, mask=mask).residuals
    # Two units in the last place where a write's last operation is fused with the sum.
    ulp = 2**-22 * np.abs(r.resid_post).max() if m.config.residual_scale != 1 else 0
    after = r.resid_pre + r.attn_out
    if not m.config.parallel:
        np.testing.assert_allclose(after, r.resid_mid, rtol=0, atol=ulp)
    post = after if r.mlp_out is None else after + r.mlp_out
    np.testing.assert_allclose(post, r.resid_post, rtol=0, atol=ulp)
    np.testing.assert_array_equal(r.embed, r.resid_pre[0])
    z = run(m, tokens, mask=mask, capture=("z",)).residuals.z * m.config.residual_scale
    heads = jnp.einsum("LBTHK,LHKD->LBTD", z, m.blocks.attn.w_o[...], precision="highest")
    if m.blocks.attn.b_o is not None:
        heads = heads + m.blocks.attn.b_o[...][:, None, None] * mask[None, ..., None]
    np.testing.assert_allclose(heads, r.attn_out, atol=2e-6 * np.abs(heads).max())


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize(
    "variant", ["llama3", "gpt2", "no_norm", "both", "stream_before", "gpt_oss"]
)
def test_padding_changes_nothing(variant, side, x64):
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side=side)
    padded = run(m, tokens, mask=mask, capture="all")
    for b, prompt in enumerate(prompts):
        alone = run(m, prompt[None], capture="all")
        for name in ("logits", *FIELDS):
            source = padded if name == "logits" else padded.residuals
            whole = getattr(source, name)
            if whole is None or name == "routing":
                continue
            whole = np.asarray(whole)
            row = whole[b] if name in (*UNSTACKED, "logits") else whole[:, b]
            single = np.asarray(getattr(alone if name == "logits" else alone.residuals, name))
            single = single[0] if name in (*UNSTACKED, "logits") else single[:, 0]
            where = np.flatnonzero(mask[b])
            axis = (name not in (*UNSTACKED, "logits")) + (name == "pattern")
            picked = np.take(row, where, axis)
            rest = np.delete(row, where, axis)
            if name == "pattern":
                assert not np.delete(picked, where, -1).any()
                picked = np.take(picked, where, -1)
            np.testing.assert_allclose(picked, single, atol=1e-10, err_msg=name)
            assert (rest == float(name in SCALES)).all(), name


@pytest.mark.parametrize("variant", ["tied", "both", "stream_after", "stream_before"])
def test_the_mean_embedding_is_that_of_all_tokens(variant, x64):
    m = model(variant, dtype="float64")
    close(m.mean_embedding(), m.embed_tokens(jnp.arange(31)).mean(0), 1e-12)


def test_what_is_no_config_or_random_stream_is_refused():
    m = model()
    for make, message in [
        (lambda: Transformer("llama", rngs=nnx.Rngs(0)), "`config` must be a ModelConfig, got"),
        (lambda: Transformer(m.config, rngs=0), "`rngs` must be nnx.Rngs, got 0; such as"),
    ]:
        with pytest.raises(TypeError, match=message):
            make()
    for field, value in [
        ("residual_scale", "x"), ("parallel", "yes"), ("attention_softcap", "a"), ("n_heads", 2.0),
        ("norm_eps", "a"), ("moe_layers", 5), ("rope_scaling", 5), ("embed_scale", np.nan),
        ("window_layers", (1, 0, 1)), ("rope_theta", 10**400), ("tied", 1),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"`{field}` must be .* got .*; "):
            dataclasses.replace(m.config, **{field: value})
    for given in [dict(factor="4"), dict(factor=None), dict(factor=float("inf"))]:
        with pytest.raises(ValueError, match="`factor` must be a number > 0, got .* needs it"):
            RopeScaling(kind="linear", **given)
    for given in (3, (), (1.0, "2"), (1.0, -1.0)):
        with pytest.raises(ValueError, match="`short_factor` must be a tuple of numbers > 0, got"):
            RopeScaling(
                kind="longrope", short_factor=given, long_factor=(1.0,), original_max_positions=4
            )


def test_garbage_and_nan_stay_in_their_row():
    m = model()
    tokens, mask, _ = batch()
    other = np.where(mask, tokens, 10**6)
    np.testing.assert_array_equal(run(m, tokens, mask=mask).logits, run(m, other, mask=mask).logits)
    bad = np.where(mask, tokens, 0)
    bad[1, -1] = 31
    logits = jax.jit(lambda m, t: m(t, mask=mask).logits)(m, bad)
    assert np.isnan(logits[1, -1]).all()
    assert np.isfinite(np.delete(logits, 1, 0)).all()


def test_later_tokens_do_not_reach_earlier_ones(x64):
    m = model(dtype="float64")
    tokens = np.arange(8)[None]
    gradient = jax.jacobian(lambda x: m.after_embedding(x).logits[0, 3])(m.embed(tokens))
    assert np.abs(gradient[:, 0, :4]).max(axis=(0, 2)).all()
    assert not gradient[:, 0, 4:].any()


@pytest.mark.parametrize(
    "variant",
    chosen(["llama3", "gpt2", "both", "stream_after", "mixed", "gpt_oss"], ["mixed"]),
)
def test_jit_and_vmap_equal_the_plain_forward(variant, x64):
    m = model(variant, dtype="float64")
    tokens = jnp.asarray(np.random.default_rng(0).integers(31, size=(3, 6)))
    plain = m(tokens, capture="all")
    jitted = run(m, tokens, capture="all")
    with jax.disable_jit():  # the layers unrolled
        unrolled = m(tokens, capture="all")
    for other in (jitted, unrolled):
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
            close(a, b, 1e-12)
    rows = jax.vmap(lambda row: m(row[None]).logits)(tokens)
    close(rows[:, 0], plain.logits, 1e-12)


def test_capture_selects_fields_layers_and_positions():
    m = model("gpt2")
    tokens, mask, _ = batch()
    whole = run(m, tokens, mask=mask, capture="all")
    out = run(m, tokens, mask=mask, capture=("z", "final"))
    assert out.logits is None and out.residuals.attn_out is None
    np.testing.assert_array_equal(out.residuals.z, whole.residuals.z)
    chosen = Capture(("logits", "resid_pre", "pattern", "z"), layers=(-1, 0), positions=(-1, 2))
    part = run(m, tokens, mask=mask, capture=chosen)
    r = part.residuals
    assert r.layers == (0, 2) and r.positions == (-1, 2)
    assert r.resid_pre.shape == (2, 5, 2, 20) and r.pattern.shape == (2, 5, 6, 2, 11)
    for b in range(5):
        where = np.flatnonzero(mask[b])
        last = where[-1]
        np.testing.assert_allclose(r.resid_pre[1, b, 0], whole.residuals.resid_pre[2, b, last])
        np.testing.assert_allclose(r.pattern[0, b, :, 0], whole.residuals.pattern[0, b, :, last])
        np.testing.assert_allclose(part.logits[b, 0], whole.logits[b, last], atol=1e-5)
        if len(where) > 2:
            np.testing.assert_allclose(r.z[0, b, 1], whole.residuals.z[0, b, where[2]])
        else:
            assert not r.z[:, b, 1].any() and not part.logits[b, 1].any()
    with pytest.raises(NotCapturedError, match="must be captured at all layers, got only"):
        r.need("resid_pre", all_layers=True)
    with pytest.raises(NotCapturedError, match="must be captured with .*mlp_out"):
        r.need("mlp_out")


def test_capture_is_checked_and_takes_lists():
    m, tokens = model(), np.arange(6)[None]
    assert Capture(["final"], layers=[0], positions=np.array([1])) == Capture(
        ("final",), (0,), (1,)
    )
    for call, error, message in [
        (lambda: Capture("final"), TypeError, r"`fields` must be .* write \('final',\)"),
        (lambda: Capture(("final",), layers=1), TypeError, "`layers` must be a tuple of integers"),
        (lambda: Capture(("final",), positions=(1.5,)), TypeError, "`positions` must be a tuple"),
        (lambda: Capture(("final",), layers=(True,)), TypeError, "`layers` must be a tuple"),
        (lambda: run(m, tokens, capture=3), TypeError, "`capture` must be .*, got 3"),
        (lambda: run(m, tokens, capture=Capture(("final",), positions=(6,))), IndexError,
         r"`positions` must be in \[-6, 6\), got 6"),
        (lambda: run(m, tokens).residuals.example(1), IndexError, r"`b` must be in .* got 1"),
        (lambda: resume(m, [[1.0]], 1), ValueError, r"`x` must be `\[B,T,20\]`, got shape"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("start", chosen(range(-3, 4), [-1, 0, 2]))
@pytest.mark.parametrize("variant", ["llama", "mixed", "stream_after"])
def test_resume_equals_the_full_forward(variant, start):
    m = model(variant)
    tokens, mask, _ = batch()
    out = run(m, tokens, mask=mask)
    points = [*out.residuals.resid_pre, out.residuals.final]
    x = points[start if start >= 0 else start + 3]
    static = resume(m, x, start, mask=mask)
    traced = jax.jit(lambda m, x, s: resume(m, x, s, mask=mask))(m, x, start)
    for again in (static, traced):
        np.testing.assert_allclose(again.logits, out.logits, atol=1e-5)
        np.testing.assert_allclose(again.residuals.final, out.residuals.final, atol=1e-5)


def test_resume_static_has_a_gradient_and_traced_a_tangent():
    m = model()
    x = run(m, np.arange(6)[None]).residuals.resid_pre[1]
    gradient = jax.grad(lambda x: resume(m, x, 1).logits[0, -1, 3])(x)
    tangent = jax.jvp(lambda x: resume(m, x, jnp.asarray(1)).logits[0, -1, 3], (x,), (x,))[1]
    np.testing.assert_allclose(jnp.vdot(gradient, x), tangent, rtol=1e-4)


def test_taps_are_added_at_their_site():
    m = model()
    tokens, mask, _ = batch()
    rng = np.random.default_rng(1)
    out = run(m, tokens, mask=mask, capture="all")
    for name in set(FIELDS) - set(SCALES) - set(out.residuals.lacks):
        plain = getattr(out.residuals, name)
        tap = jnp.asarray(rng.normal(size=plain.shape), plain.dtype)
        if name in UNSTACKED:
            edited = run(m, tokens, mask=mask, edits=Add(name, tap)).logits
        else:
            edits = tuple(Add(name, tap[i], layer=i) for i in range(3))
            edited = run(m, tokens, mask=mask, edits=edits).logits
        tapped = jax.jit(lambda m, taps: m(tokens, mask=mask, taps=taps).logits)(m, {name: tap})
        np.testing.assert_allclose(tapped, edited, atol=1e-4, err_msg=name)
        assert np.abs(tapped - out.logits).max() > 0.1, name


class TestEdits:
    tokens, mask, prompts = batch()

    def go(self, *edits, capture="all"):
        return run(self.model, self.tokens, mask=self.mask, edits=edits, capture=capture)

    @pytest.fixture(autouse=True)
    def _model(self):
        self.model = model("gpt2")
        self.plain = run(self.model, self.tokens, mask=self.mask, capture="all")

    def test_set_a_head(self):
        z = self.go(Set("z", 0.0, layer=1, head=2)).residuals.z
        plain = self.plain.residuals.z
        assert not z[1, :, :, 2].any()
        np.testing.assert_array_equal(z[0], plain[0])
        np.testing.assert_array_equal(np.delete(z[1], 2, 2), np.delete(plain[1], 2, 2))
        assert np.abs(z[2] - plain[2]).max() > 1e-3

    def test_set_at_a_position_counted_in_real_tokens(self):
        value = np.arange(20.0)
        pre = self.go(Set("resid_pre", value, layer=-1, position=-1)).residuals.resid_pre
        for b in range(5):
            where = np.flatnonzero(self.mask[b])
            np.testing.assert_array_equal(pre[2, b, where[-1]], value)
            np.testing.assert_array_equal(
                np.delete(pre[2, b], where[-1], 0),
                np.delete(self.plain.residuals.resid_pre[2, b], where[-1], 0),
            )

    def test_scale_and_add(self):
        r = self.go(Scale("attn_out", 2.0, layer=0), Add("attn_out", np.ones(20), layer=0))
        expected = 2 * self.plain.residuals.attn_out[0] + 1
        expected = np.where(self.mask[..., None], expected, 0)
        np.testing.assert_allclose(r.residuals.attn_out[0], expected, atol=1e-5)

    def test_project_leaves_the_complement(self):
        directions = np.random.default_rng(0).normal(size=(2, 20))
        final = self.go(Project("final", directions)).residuals.final
        np.testing.assert_allclose(final @ directions.T, 0, atol=1e-4)
        basis = np.linalg.qr(directions.T)[0]
        plain = self.plain.residuals.final
        np.testing.assert_allclose(final, plain - plain @ basis @ basis.T, atol=1e-4)

    def test_replace_by_itself_changes_nothing_and_by_another_run_patches(self):
        same = self.go(Replace("resid_mid", self.plain.residuals.resid_mid))
        np.testing.assert_allclose(same.logits, self.plain.logits, atol=1e-5)
        other = run(self.model, (self.tokens + 1) % 31, mask=self.mask).residuals
        whole = self.go(Replace("resid_post", jnp.stack(list(other.resid_post)), layer=1))
        np.testing.assert_allclose(whole.residuals.resid_pre[2], other.resid_pre[2], atol=1e-6)

    def test_a_function_is_an_edit(self):
        def double(site, layer, value):
            return jnp.where(layer == 1, 2 * value, value) if site == "mlp_out" else value

        edited = self.go(double)
        same = self.go(Scale("mlp_out", 2.0, layer=1))
        np.testing.assert_allclose(edited.logits, same.logits, atol=1e-6)

    def test_a_sweep_over_layers_and_heads_is_one_vmap(self):
        def effect(layer, head):
            return run(
                self.model, self.tokens, mask=self.mask, capture=("logits",),
                edits=Set("z", 0.0, layer=layer, head=head),
            ).logits  # fmt: skip

        sweep = jax.vmap(jax.vmap(effect, (None, 0)), (0, None))(jnp.arange(3), jnp.arange(6))
        for layer, head in ((0, 0), (2, 5), (1, 3)):
            one = effect(layer, head)
            np.testing.assert_allclose(sweep[layer, head], one, atol=1e-5)

    def test_new_values_do_not_recompile(self):
        self.go(Set("z", 0.0, layer=1, head=2))
        with compilations() as compiled:
            self.go(Set("z", 1.0, layer=2, head=0))
        assert compiled == []

    @pytest.mark.parametrize(
        ("edit", "error", "message"),
        [
            (Set("nowhere", 0.0), ValueError, "`site` must be one of .* got 'nowhere'"),
            (Set("z", 0.0, layer=3), IndexError, r"`layer` must be in \[-3, 3\), got 3"),
            (Set("z", 0.0, head=6), IndexError, r"`head` must be in \[0, 6\), got 6"),
            (Set("mlp_out", 0.0, head=0), ValueError, "`head` must be None at site 'mlp_out', got"),
            (Set("z", 0.0, layer=np.int64(-4)), IndexError, r"in \[-3, 3\), got -4"),
            (Set("z", 0.0, position=9), IndexError, r"`position` must be in \[-9, 9\), got 9"),
            (Set("z", 0.0, position=-10), IndexError, r"`position` must be in \[-9, 9\), got -10"),
            (Add("z", np.ones(7), head=1), ValueError, r"`value` must be .*, got shape \(7,\)"),
            (Replace("final", np.ones((2, 9))), ValueError, "`value` must be broadcastable to"),
            ("ablate", TypeError, "`edits` must be made of edits, got"),
            (Set("z", 0.0, layer=True), TypeError, "`layer` must be an integer, got True"),
            (Set("z", 0.0, layer=1.5), TypeError, "`layer` must be an integer, got 1.5"),
            (Set("z", 0.0, layer=[0, 1]), TypeError, "`layer` must be an integer, got"),
            (Set("z", 0.0, head="a"), TypeError, "`head` must be an integer, got 'a'"),
            (Set("z", 0.0, position=1.5), TypeError, "`position` must be an integer, or one for"),
            (Set("z", 0.0, position=[1, 2]), TypeError, "or one for each of 5 rows, got"),
            (Set("final", 0.0, layer=0), ValueError, "`layer` must be None at site 'final', got 0"),
            (Add("resid_pre", "abc"), TypeError, "`value` must be numbers, got 'abc'"),
            (
                Replace("z", np.ones((2, 5, 11, 6, 4))),
                ValueError,
                "`value` must be of all 3 layers",
            ),
        ],
    )
    def test_bad_edits(self, edit, error, message):
        with pytest.raises(error, match=message):
            self.go(edit)

    def test_edits_that_are_none(self):
        with pytest.raises(TypeError, match="`edits` must be edits, got None"):
            run(self.model, self.tokens, mask=self.mask, edits=None)
        for name, variant in (("mlp_out", "attention_only"), ("norm_attn_scale", "no_norm")):
            with pytest.raises(ValueError, match=f"`site` must be one of .* got '{name}'"):
                run(model(variant), np.arange(4)[None], edits=Set(name, 0.0))

    def test_one_position_a_row(self):
        pre = self.go(Set("resid_pre", 7.0, layer=1, position=[2, -1, 0, 0, 5])).residuals.resid_pre
        changed = np.asarray(pre[1] == 7.0).all(-1)
        for b, place in enumerate((2, -1, 0, 0, 5)):
            want = np.zeros(11, bool)
            want[np.flatnonzero(self.mask[b])[place]] = True
            np.testing.assert_array_equal(changed[b], want)

    def test_replace_takes_what_set_takes(self):
        value = np.random.default_rng(0).normal(size=(5, 20))
        options = dict(layer=1, position=-1)
        a, b = (self.go(edit("resid_pre", value, **options)) for edit in (Replace, Set))
        np.testing.assert_array_equal(a.logits, b.logits)

    def test_project_off_dependent_and_zero_directions(self):
        one = np.random.default_rng(0).normal(size=20)
        plain, zero = self.go(Project("final", one)), self.go(Project("final", np.zeros(20)))
        np.testing.assert_allclose(zero.logits, self.plain.logits, atol=1e-5)
        twice = self.go(Project("final", [one, 2 * one, 0 * one]))
        np.testing.assert_allclose(twice.logits, plain.logits, atol=1e-4)
        half = model("gpt2", dtype="bfloat16")
        edited = run(half, self.tokens, mask=self.mask, capture="all",
                     edits=Project("z", np.arange(1.0, 5.0)))  # fmt: skip
        assert np.abs(edited.residuals.z.astype(np.float32) @ np.arange(1.0, 5.0)).max() < 0.1


def test_every_field_of_the_config_is_read():
    """Changing a field changes the shapes or the logits."""
    rich = config("gpt2", tied=False, unembed_bias=True)
    rope = config("llama3", window=4, qk_norm="head", norm="layernorm")
    alibi = config("stream_before")
    moe = config("gpt_oss", d_shared_expert=7, norm_placement="both", attention_softcap=3.0)
    changes = {
        rich: dict(
            n_layers=2, d_model=21, n_heads=7, d_head=5, d_mlp=29, vocab_size=33, norm="rmsnorm",
            norm_eps=1e-2, positions=None, max_positions=41, attention_scale=0.1,
            scale_by_inverse_layer=False, qkv_bias=False, out_bias=False, activation="relu",
            gated=True, mlp_bias=False, tied=True, unembed_bias=False, dtype="bfloat16",
            stream_dtype="bfloat16", norm_gain=False, norm_bias=False, norm_offset=1.0,
            norm_placement="stream_after", final_norm=False, embed_norm=True, position_offset=2,
            parallel=True, residual_scale=0.5, embed_scale=2.0, d_embed=9, logit_scale=0.5,
            logit_softcap=2.0, clip_qkv=0.3, qk_norm="all_heads",
        ),
        rope: dict(
            n_kv_heads=2, rope_theta=50.0, rope_scaling=None, rotary_dim=2, rope_interleaved=True,
            rope_layers=(True, False, True), window=5, window_layers=(True, False, True),
            window_rope_theta=3.0, qk_norm_bias=True, sinks=True, parallel=True,
        ),
        config("parallel"): dict(shared_norm=True),
        alibi: dict(falcon_alibi=True),
        moe: dict(
            attention_softcap=1.0, mlp_limit=0.3, up_offset=0.5, n_experts=4, experts_per_token=3,
            d_expert=12, d_shared_expert=0, renormalise=False, router_bias=False,
            moe_layers=(True, True, False), window_rope_scaling=LLAMA3,
        ),
    }  # fmt: skip
    seen = set()

    def shapes(m):
        return [(a.shape, str(a.dtype)) for a in jax.tree.leaves(m)]

    def logits(m):
        return np.asarray(run(m, np.arange(20)[None], capture=("logits",)).logits)

    for start, fields in changes.items():
        plain = built(start)
        for field, value in fields.items():
            extra = {"n_kv_heads": 7} if field == "n_heads" else {}
            extra = {"d_mlp": 9} if field == "moe_layers" else extra
            other = built(dataclasses.replace(start, **{field: value}, **extra))
            same = shapes(other) == shapes(plain)
            assert not same or np.abs(logits(other) - logits(plain)).max() > 1e-4, field
            seen.add(field)
    read_elsewhere = {"matmul_precision"}  # by the test of the jaxpr
    assert seen | read_elsewhere == {f.name for f in dataclasses.fields(rich)}


def test_no_layers_is_a_bigram_model(x64):
    """G5: with W_E = I and W_U = log P the output is the row of P, to rounding."""
    rng = np.random.default_rng(0)
    table = rng.dirichlet(np.ones(7), size=7)
    m = model(
        n_layers=0, d_model=7, vocab_size=7, d_mlp=0, gated=False, activation="identity",
        norm=None, norm_eps=None, positions=None, rope_theta=None, dtype="float64",
    )  # fmt: skip
    m.w_e[...] = jnp.eye(7)
    m.w_u[...] = jnp.log(table)
    tokens = rng.integers(7, size=(2, 5))
    logits = run(m, tokens).logits
    np.testing.assert_allclose(jax.nn.softmax(logits), table[tokens], atol=1e-12)


class TestSegments:
    """A model of which some layers have experts."""

    tokens, mask, _ = batch()

    def go(self, m, **options):
        return run(m, self.tokens, mask=self.mask, **options)

    @pytest.mark.parametrize("layers", [(0,), (1,), (-1, 0), ()])
    def test_layers_of_some_segments(self, layers):
        m = model("mixed_more")
        whole = self.go(m, capture="all").residuals
        fields = ("resid_pre", "mlp_act", "routing")
        part = self.go(m, capture=Capture(fields, layers=layers)).residuals
        rows = sorted(layer % 3 for layer in layers)
        np.testing.assert_array_equal(part.resid_pre, whole.resid_pre[np.array(rows, int)])
        for segment in range(3):
            assert part.mlp_act[segment].shape[0] == (segment in rows)
        if 0 in rows:
            np.testing.assert_array_equal(part.routing[0].index, whole.routing[0].index)
        assert (
            self.go(model(), capture=Capture(("resid_pre",), layers=())).residuals.resid_pre.size
            == 0
        )

    def test_edits_of_what_differs_between_segments(self):
        m = model("mixed")
        plain = self.go(m, capture="all")
        act = plain.residuals.mlp_act
        same = self.go(m, edits=Replace("mlp_act", act))
        np.testing.assert_allclose(same.logits, plain.logits, atol=1e-5)
        other = run(m, (self.tokens + 1) % 31, mask=self.mask, capture="all").residuals.mlp_act
        edited = self.go(m, edits=Replace("mlp_act", (None, other[1])), capture="all").residuals
        np.testing.assert_array_equal(edited.mlp_act[0], act[0])
        np.testing.assert_array_equal(edited.mlp_act[1], other[1])
        one = self.go(
            m, edits=Set("mlp_act", (np.ones(28), None), layer=0), capture="all"
        ).residuals
        assert (np.asarray(one.mlp_act[0])[0][self.mask] == 1).all()
        three = self.go(m, edits=Set("mlp_act", 0.0, layer=2), capture="all").residuals
        assert three.mlp_act[1][0].any() and not three.mlp_act[1][1].any()
        with pytest.raises(ValueError, match="`value` must be .* give a tuple, a value"):
            self.go(m, edits=Set("mlp_act", np.ones(28), layer=0))
        with pytest.raises(ValueError, match="a tuple of 2, one for each segment, got 3 values"):
            self.go(m, edits=Set("mlp_act", (None, None, 1.0)))


@pytest.mark.parametrize(
    "variant", ["llama3", "gpt2", "both", "post", "parallel", "shared_norm", "mixed", "no_norm"]
)
def test_what_is_added_to_the_stream_is_added_to_every_reader(variant, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch(lengths=(5, 3))
    step = np.random.default_rng(0).normal(size=20)
    stream = run(m, tokens, mask=mask, edits=Add("resid_post", step, layer=0)).logits
    readers = ("q_in", "k_in", "v_in", "mlp_in")
    each = [Add(site, step, layer=i) for site in readers for i in (1, 2)]
    close(run(m, tokens, mask=mask, edits=(*each, Add("final", step))).logits, stream, 1e-12)
    some = run(m, tokens, mask=mask, edits=each[1:]).logits
    assert np.abs(some - stream).max() > 1e-6


def test_one_reader_reads_by_itself(x64):
    m = model(norm=None, norm_eps=None, positions=None, rope_theta=None, dtype="float64")
    tokens, mask, _ = batch(lengths=(5, 3))
    step = np.random.default_rng(0).normal(size=20)
    plain = run(m, tokens, mask=mask, capture="all").residuals
    attn = m.blocks.attn
    for site, w, head in (("q", attn.w_q, 4), ("k", attn.w_k, 1), ("v", attn.w_v, 2)):
        edit = Add(f"{site}_in", step, layer=1, head=head, position=1)
        found = run(m, tokens, mask=mask, edits=edit, capture="all").residuals
        change = np.zeros(getattr(plain, site).shape)[1]
        change[[0, 1], [np.flatnonzero(row)[1] for row in mask], head] = step @ w[...][1, :, head]
        close(getattr(found, site)[1], getattr(plain, site)[1] + change, 1e-12)
        for other in {"q", "k", "v"} - {site}:
            np.testing.assert_array_equal(getattr(found, other)[1], getattr(plain, other)[1])
        np.testing.assert_array_equal(found.resid_pre[:2], plain.resid_pre[:2])
    found = run(m, tokens, mask=mask, edits=Add("mlp_in", step, layer=1), capture="all").residuals
    np.testing.assert_array_equal(found.resid_mid[:2], plain.resid_mid[:2])
    assert np.abs(found.mlp_out[1] - plain.mlp_out[1]).max() > 1e-3
