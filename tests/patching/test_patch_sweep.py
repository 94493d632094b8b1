"""patch_sweep: every cell against the run with that one edit, exact cases, cost, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Replace, Set, run
from arrakis_jax.forward.targets import KL, Continuation, Custom, Logit
from arrakis_jax.nn.layer_run import LayerRun
from arrakis_jax.patching import patch_sweep as module
from arrakis_jax.patching.pairs import fields_of
from arrakis_jax.patching.patch_sweep import column_steps, patch_sweep
from tests.cost import flops, temporary
from tests.induction import N, induction_model, induction_tokens
from tests.models import chosen, close, compilations, gpt2_small, model
from tests.patching.single import TARGET, edited, linear, pairs, target_of


@pytest.fixture
def tokens():
    return induction_tokens()


def one_by_one(m, base, source, mask, sites, over, patch="resample"):
    """The definition: for each site and cell a run with one edit; and the targets of both runs.

    The edits of the other sites are there, so that one program serves all, but select nothing: a
    layer, head or position that does not exist.
    """
    fields = fields_of(sites)
    streams = [run(m, x, mask=mask, capture=fields).residuals for x in (source, base)]
    count = np.cumsum(mask, 1) - 1

    def edit_of(site, at):
        value, kept = (np.asarray(getattr(stream, site)) for stream in streams)
        if patch == "mean":
            axes = (0, 1) if site in ("embed", "final") else (1, 2)
            value = np.broadcast_to(value.sum(axes, keepdims=True) / mask.sum(), value.shape)
        if "layer" in at:
            value, kept = (x[at["layer"] % len(x)] for x in (value, kept))
        if "neuron" in at:  # of one layer, before which nothing has changed
            value = np.where(np.arange(value.shape[-1]) == at["neuron"], value, kept)
        where = {axis: jnp.asarray(i) for axis, i in at.items() if axis != "neuron"}
        return Set(site, 0.0, **where) if patch == "zero" else Replace(site, value, **where)

    def target(ids, site=None, at=None):
        nowhere = {axis: 10**6 for axis in over}
        nowhere |= {"position": np.full(len(mask), 10**6)} if "position" in over else {}
        edits = [(x, at if x == site else nowhere) for x in sites if over or x == site]
        return target_of(edited(m, ids, mask, tuple(edit_of(*e) for e in edits)), mask)

    before, found = target(base), {}
    sizes = {"layer": m.config.n_layers, "position": mask.shape[1], "neuron": m.config.d_mlp}
    for site in sites:
        sizes["head"] = m.config.n_kv_heads if site in ("k", "v") else m.config.n_heads
        found[site] = np.zeros((*(sizes[axis] for axis in over), len(mask)))
        for cell in np.ndindex(found[site].shape[:-1]):
            at = dict(zip(over, cell, strict=True))
            real = np.ones(len(mask), bool)
            if "position" in at:
                column = at["position"]
                real = mask[:, column]
                at["position"] = np.where(real, count[:, column], 10**6)
            found[site][cell] = np.where(real, target(base, site, at) - before, 0)
    return found, before, target(source)


PLACES, HEADS = ("layer", "position"), ("head", "layer", "position")
CASES = [
    ("llama", {}, ("resid_pre", "attn_out", "resid_mid", "resid_post"), PLACES),
    ("llama", {}, ("q", "k", "v", "z", "pattern"), HEADS),
    ("gpt2", {"base": "corrupt"}, ("embed", "final", "resid_post"), ("position",)),
    ("gpt2", {}, ("mlp_act",), ("layer", "neuron")),
    ("gpt2", {"patch": "zero"}, ("z", "pattern"), ("head", "position")),
    ("both", {"patch": "mean"}, ("z", "k"), ("layer", "head")),
    ("parallel", {"patch": "zero"}, ("mlp_out", "resid_pre"), ("layer",)),
    ("stream_after", {"patch": "mean"}, ("resid_mid", "resid_post"), ()),
    ("mixed", {}, ("mlp_out", "pattern"), ("position", "layer")),
]


@pytest.mark.parametrize(
    ("variant", "options", "sites", "over"), chosen(CASES, CASES[1:6] + CASES[8:])
)
def test_every_cell_is_a_run_with_one_edit(variant, options, sites, over, x64):
    """And a run patched into itself is unchanged."""
    m = model(variant, dtype="float64", sinks=variant == "mixed")
    clean, corrupt, mask, _ = pairs()
    swapped = options.get("base") == "corrupt"
    base, source = (corrupt, clean) if swapped else (clean, corrupt)
    patch = options.get("patch", "resample")
    how = dict(sites=sites, over=over, mask=mask, cell_batch=4, **options)
    found = patch_sweep(m, clean, corrupt, TARGET, **how)
    want, before, other = one_by_one(m, base, source, mask, sites, over, patch)
    for site in sites:
        assert np.abs(want[site]).max() > 1e-3, site
        close(found.by_site[site], want[site], 1e-10, site)
    close(found.base, before, 1e-12)
    if patch != "resample":
        assert found.source is None
        return
    close(found.source, other, 1e-12)
    same = patch_sweep(m, base, base, TARGET, **how)
    assert np.abs(same.terms).max() <= 1e-13 * np.abs(before).max()


@pytest.fixture
def all_columns(monkeypatch):
    """Sweeps run every column for every cell, as the definition does."""
    return lambda: monkeypatch.setattr(module, "column_steps", lambda n: [(0, n)])


REUSED = {
    "both": ("resid_pre", "resid_post", "attn_out", "q", "k"),  # windows, scores with a soft-cap
    "stream_before": ("v", "z", "pattern"),  # ALiBi
    "gpt_oss": ("pattern", "k", "resid_mid"),  # sinks
    "llama3": ("embed", "final"),
}


CHANGES = dict.fromkeys(REUSED, {}) | dict.fromkeys(
    ("both", "gpt_oss"), dict(window_layers=(True, False))
)


@pytest.mark.parametrize("variant", chosen(REUSED, ["llama3"]))
def test_earlier_positions_keep_their_keys_and_values(variant, all_columns, x64):
    """Three steps of columns; all of them for every cell give the same numbers."""
    m = model(variant, dtype="float64", n_layers=2, **CHANGES[variant])
    clean, corrupt, mask, _ = pairs(lengths=(16, 9))
    over = ("position",) if variant == "llama3" else ("layer", "position")
    how = dict(sites=REUSED[variant], over=over, mask=mask, cell_batch=5)
    assert column_steps(mask.shape[1]) == [(0, 8), (8, 16), (16, 18)]
    found = patch_sweep(m, clean, corrupt, TARGET, **how)
    jax.clear_caches()
    all_columns()
    want = patch_sweep(m, clean, corrupt, TARGET, **how)
    jax.clear_caches()
    for site, effects in want.by_site.items():
        assert np.abs(effects).max() > 1e-3, site
        close(found.by_site[site], effects, 1e-10, site)


def test_earlier_positions_cost_nothing(all_columns):
    """Four steps: 5/8 of the products, beyond the runs of the pair."""
    m = gpt2_small()
    like = jax.ShapeDtypeStruct((1, 32), jnp.int32)

    def products():
        pair = 2 * flops(lambda m, x: m(x, capture=("final",)).residuals.final, m, like)
        return flops(lambda m, x: patch_sweep(m, x, x, TARGET).effects, m, like) - pair

    some = products()
    all_columns()
    jax.clear_caches()
    assert some < 0.63 * products()
    jax.clear_caches()


def test_a_prompt_in_a_batch_and_alone(x64):
    """G19: padding and garbage change nothing, and have no effect."""
    m = model("both", dtype="float64")
    target = KL(np.linspace(0, 3, 31))
    how = dict(sites=("resid_post", "z"))
    *_, prompts = pairs()
    own, other = prompts[1]
    alone = patch_sweep(m, [own], [other], target, **how)
    for side in ("left", "holes"):
        clean, corrupt, mask, _ = pairs(side=side)
        whole = patch_sweep(m, clean, corrupt, target, mask=mask, **how)
        for site in how["sites"]:
            effects = np.asarray(whole.by_site[site])
            assert not effects[:, ~mask.T].any()
            close(effects[:, mask[1], 1], alone.by_site[site][..., 0], 1e-10)
            close(whole.source[1:], alone.source, 1e-12)


def test_every_kind_of_target(x64):
    """Continuation, and a function of the logits at every position, by a run for each layer."""
    m = model("llama", dtype="float64")
    clean, corrupt, mask, _ = pairs()
    z = run(m, corrupt, mask=mask, capture=("z",)).residuals.z
    *outputs, before = (
        edited(m, clean, mask, (Replace("z", z[i % 3], layer=jnp.asarray(i)),)) for i in range(4)
    )
    last = [np.flatnonzero(row)[-1] for row in mask]

    def ends(logits):
        """The log-probability of each row's last token."""
        log_p = np.asarray(jax.nn.log_softmax(logits, -1))
        previous = [np.flatnonzero(row)[-2] for row in mask]
        return np.array(
            [log_p[b, p, clean[b, t]] for b, (p, t) in enumerate(zip(previous, last, strict=True))]
        )

    def surprise(logits):
        return jnp.logaddexp.reduce(logits, -1).sum(-1)

    how = dict(sites="z", over="layer", mask=mask)
    found = patch_sweep(m, clean, corrupt, Continuation(1), **how)
    close(found.effects, np.stack([ends(x) - ends(before) for x in outputs]), 1e-10)
    found = patch_sweep(m, clean, corrupt, Custom(surprise, position=None), **how)
    real = np.where(mask[..., None], outputs, 0)
    close(found.effects, np.stack([surprise(x) - surprise(before) for x in real]), 1e-10)


def test_induction_is_known(x64, tokens):  # noqa: F811
    """G4: without the layer 0 head the copy's logit goes from 1 to 0; so it does without layer 1's.

    With the copied token's key of layer 1 zero, only that position's head can do nothing.
    """
    m, position = induction_model(), 2 * N - 1
    target = Logit(tokens[:, position + 1], position=position)
    found = patch_sweep(m, tokens, None, target, sites="z", over="layer", patch="zero")
    np.testing.assert_allclose(found.effects, -1, atol=1e-12)
    assert found.source is None
    found = patch_sweep(
        m, tokens, None, target, sites=("z", "k"), over=("layer", "position"), patch="zero"
    )
    source = position - N + 1
    for site, layer, at in (("z", 0, source), ("z", 1, position), ("k", 1, source)):
        effects = np.asarray(found.by_site[site][layer])
        np.testing.assert_allclose(effects[at], -1, atol=1e-9)
        np.testing.assert_allclose(np.delete(effects, at, 0), 0, atol=1e-9)


def test_effects_add_up_in_a_linear_network(x64):
    m = linear()
    clean, corrupt, mask, _ = pairs()

    def effects(*over):
        return patch_sweep(
            m, clean, corrupt, TARGET, sites=("resid_pre", "z"), over=over, mask=mask
        )  # fmt: skip

    cells, whole = effects("layer", "position"), effects("layer")
    for site, layers in whole.by_site.items():
        close(cells.by_site[site].sum(1), layers, 1e-12)
    # The stream before all layers decides everything.
    close(whole.by_site["resid_pre"][0], whole.source - whole.base, 1e-12)


def test_one_program_for_all_ids_and_targets():
    m = model("gpt2")
    clean, corrupt, mask, _ = pairs()
    how = dict(sites="z", over=("head", "layer"), mask=mask)
    first = patch_sweep(m, clean, corrupt, Logit(3, against=4), **how)
    with compilations() as names:
        patch_sweep(m, corrupt, clean, Logit(5, against=6, position=-2), **how)
        again = patch_sweep(m, clean, corrupt, Logit([3, 3], against=[4, 4]), **how)
    assert not any("sweep" in name for name in names), names
    assert (first.effects == again.effects).all()


def test_under_jit_and_vmap():
    m = model("llama")
    clean, corrupt = np.random.default_rng(0).integers(31, size=(2, 3, 5))

    def effects(clean, corrupt):
        return patch_sweep(m, clean, corrupt, TARGET, sites="v", over=("layer", "head")).effects

    one = jax.jit(jax.vmap(effects))(clean[:, None], corrupt[:, None])
    close(jnp.moveaxis(one[..., 0], 0, -1), effects(clean, corrupt), 1e-5)


def test_heads_by_positions_cost_little_more_than_half(monkeypatch):
    """Blocks are counted as they run: those of the pair, and of each cell from its layer on."""
    ran = []
    step = LayerRun.step

    def counted(self, *args):
        jax.debug.callback(lambda: ran.append(1))
        return step(self, *args)

    n_layers, cell_batch = 12, 16
    m = model("gpt2", n_layers=n_layers, n_heads=3, n_kv_heads=3)
    clean = np.random.default_rng(0).integers(31, size=(1, 8))
    monkeypatch.setattr(LayerRun, "step", counted)

    def sweep(clean, corrupt):  # a program of its own, which no other call can have compiled
        return patch_sweep(
            m, clean, corrupt, TARGET, sites="z", over=("layer", "head", "position"),
            cell_batch=cell_batch,
        ).effects  # fmt: skip

    jax.block_until_ready(jax.jit(sweep)(clean, clean))
    jax.effects_barrier()
    cells = 3 * 8
    rounds = -(-cells // cell_batch)
    at_once = -(-cells // rounds)
    triangle = n_layers * (n_layers + 1) // 2
    assert len(ran) == 2 * n_layers + rounds * triangle
    forwards = 2 + rounds * at_once * triangle / n_layers
    assert forwards <= 0.6 * n_layers * cells


def test_the_products_of_a_plan_with_static_starts():
    """What the blocks that run cost, counted in a program that a loop over layers wrote."""
    m = model("gpt2", n_layers=4, dtype="float32")
    clean = jnp.ones((2, 8), int)
    heads, length, size = m.config.n_heads, 8, 16

    def forward(x):
        return m.after_embedding(x, capture=("final",)).residuals.final

    x = jnp.zeros((2, length, m.config.d_model))
    block = flops(forward, x) / m.config.n_layers

    def edit(cell):
        def edited(site, layer, value):
            return value * cell if site == "z" else value

        return edited

    def plan(x):
        def layer(start):
            return jax.lax.map(
                jax.vmap(lambda cell: m.blocks_from(x, start, edits=(edit(cell),))),
                jnp.zeros((heads * length // size, size)),
            )

        return [layer(start) for start in range(m.config.n_layers)]

    assert flops(plan, x) == block * heads * length * 4 * 5 / 2

    def sweep(clean):
        return patch_sweep(
            m, clean, clean, TARGET, sites="z", over=("layer", "head", "position"), cell_batch=size
        ).effects

    # In the jaxpr the loop over blocks has no length: its body counts once for each cell.
    reading = flops(lambda x: jnp.einsum("BD,BD->B", x[:, 0], x[:, 0]), x) * 2
    cells = 4 * heads * length
    assert flops(sweep, clean) == 2 * 4 * block + 2 * reading + cells * (block + reading)


@pytest.mark.exhaustive
def test_temporary_memory_is_that_of_a_chunk():
    m = model("gpt2", n_heads=8, n_kv_heads=8, d_model=32)
    like = jax.ShapeDtypeStruct((2, 32), jnp.int32)

    def bytes_of(cell_batch, *over):
        def sweep(clean, corrupt):
            return patch_sweep(
                m, clean, corrupt, TARGET, sites="z", over=over, cell_batch=cell_batch
            ).effects

        return temporary(sweep, like, like)

    few, many = bytes_of(4, "layer", "position"), bytes_of(4, "layer", "head", "position")
    assert many <= 1.1 * few  # 32 and 256 cells a layer


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (dict(sites="zz"), ValueError, "`sites` must be made of"),
        (dict(sites=("z", "z")), ValueError, "different names"),
        (dict(sites=("mlp_out", "resid_pre"), over="head"), ValueError, "axes of one of"),
        (dict(over=("layer", "layer")), ValueError, "different axes"),
        (dict(over="token"), ValueError, "`over` must be one of"),
        (dict(sites="embed"), ValueError, "'embed', got 'layer'"),
        (dict(sites="z", over=("layer", "neuron")), ValueError, "'z', got 'neuron'"),
        (dict(base="noise"), ValueError, "`base` must be one of"),
        (dict(patch="noise"), ValueError, "`patch` must be one of"),
        (dict(cell_batch=0), ValueError, "`cell_batch` must be an int"),
        (dict(corrupt=None), TypeError, "`corrupt` must be token ids"),
        (dict(corrupt=[[1, 2]]), ValueError, "`corrupt` must be of clean's shape"),
        (dict(target=99), ValueError, "`target` must be in"),
        (dict(mask=[[0, 0, 0]]), ValueError, "`mask` must be true"),
    ],
)
def test_bad_input_is_refused(change, error, match):
    good = dict(clean=[[1, 2, 3]], corrupt=[[1, 4, 3]], target=3)
    with pytest.raises(error, match=match):
        patch_sweep(model("llama"), **good | change)


def test_sites_that_a_model_lacks_are_refused():
    for variant, site in (
        ("parallel", "resid_mid"),
        ("moe", "mlp_act"),
        ("attention_only", "mlp_out"),
    ):
        with pytest.raises(ValueError, match="`sites` must be made of"):
            patch_sweep(model(variant), [[1, 2]], [[1, 3]], 3, sites=site)
    with pytest.raises(ValueError, match="patch q, k or z"):
        patch_sweep(model("llama"), [[1, 2]], [[1, 3]], 3, sites="pattern", patch="mean")


def test_of_several_sites_each_has_its_own_axes():
    m = model("gpt2", n_layers=2)
    clean, corrupt = [[1, 2, 3]], [[1, 4, 3]]
    found = patch_sweep(m, clean, corrupt, 3, sites=("z", "resid_pre"), over=("layer", "head"))
    for site, over in (("z", ("layer", "head")), ("resid_pre", "layer")):
        one = patch_sweep(m, clean, corrupt, 3, sites=site, over=over)
        np.testing.assert_allclose(found.effects[site], one.effects, atol=1e-6)
    assert str(found.labels[0]) == "L0 z head 0" and str(found.labels[-1]) == "L1 resid_pre"
