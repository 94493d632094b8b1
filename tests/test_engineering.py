"""Cost, compilation, precision, export, and the two entries for bfloat16 on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import arrakis_jax
from arrakis_jax import (
    KL,
    Continuation,
    Custom,
    Entropy,
    Graph,
    Logit,
    LogProb,
    Prob,
    Transformer,
    agreement,
    attribute_movement,
    attribute_to,
    attribution_patching,
    bigram_logits,
    composition_scores,
    config_for,
    copying_traces,
    cpu_compiler_options,
    decompose,
    edge_attribution,
    feature_attribution,
    flow_routes,
    head_scores,
    information_flow,
    linear_cka,
    logit_attribution,
    logit_lens,
    movement_matrix,
    ov_matrices,
    patch_sweep,
    path_patching,
    qk_matrices,
    residual_decomposition,
    residual_gradients,
    residual_movement,
    resume,
    run,
    run_circuit,
    skip_trigrams,
    stream_geometry,
    token_faithfulness,
    top_attribution,
    virtual_head,
)
from arrakis_jax.movement.information_flow import FLOW_METHODS
from tests.cost import dots, flops, temporary
from tests.models import batch, chosen, close, gpt2_small, model

TOKENS, MASK, _ = batch(lengths=(6, 4))
TOKENS = np.where(MASK, TOKENS, 0)


def movement_of(m, t, k):
    return residual_movement(m, t, 0, -1, mask=k)


def other(t):
    """The source of a pair: the same prompts with other tokens."""
    return (t + 1) % 31


EDGES = (
    ((0, "head", 1), (1, "k", 2)),
    ((None, "embed"), (2, "mlp")),
    ((1, "mlp"), (None, "final")),
)
# One for each kind; new ids and positions are no other kind.
TARGETS = {
    "log_prob": lambda t: LogProb(3),
    "prob": lambda t: Prob(t[:, -1]),
    "entropy": lambda t: Entropy(),
    "kl": lambda t: KL(jnp.sin(jnp.arange(31.0))),
    "continuation": lambda t: Continuation(2),
    "custom": lambda t: Custom(lambda logits: logits[:, :3].max(-1)),
}
TOOLS = {
    "run": lambda m, t, k: run(m, t, mask=k, capture="all"),
    "resume": lambda m, t, k: resume(m, m.embed(t, mask=k), 1, mask=k),
    "decompose": lambda m, t, k: decompose(m, t, mask=k, by="head").norms(),
    "residual_decomposition": lambda m, t, k: residual_decomposition(run(m, t, mask=k), 1),
    "logit_attribution": lambda m, t, k: logit_attribution(m, t, 3, mask=k, by="head"),
    "logit_attribution_everywhere": lambda m, t, k: logit_attribution(
        m, t, 3, mask=k, by="component", position=None
    ),
    "logit_attribution_by_source": lambda m, t, k: logit_attribution(
        m, t, 3, mask=k, by="source", position=None
    ),
    "logit_attribution_of_a_layer": lambda m, t, k: (
        logit_attribution(m, t, 3, mask=k, by="neuron", layers=(1,), kinds=("neuron",)).terms
    ),
    "top_attribution": lambda m, t, k: top_attribution(m, t, 3, 4, mask=k).terms,
    "attribute_to": lambda m, t, k: attribute_to(
        m, t, m.blocks.mlp.w_in[1, :, 3], mask=k, at=("resid_mid", 1), through="mlp", by="source"
    ),
    "attribute_movement": lambda m, t, k: attribute_movement(m, t, 0, mask=k, by="head"),
    "logit_lens": lambda m, t, k: logit_lens(m, t, 3, mask=k, chunk=7),
    "residual_movement": movement_of,
    "movement_matrix_reduced": lambda m, t, k: movement_matrix(
        m, t, mask=k, reduce="median", first=False
    ),
    "stream_geometry": lambda m, t, k: stream_geometry(m, t, mask=k),
    "linear_cka": lambda m, t, k: linear_cka(m, t, mask=k),
    **{
        f"information_flow_{method}": lambda m, t, k, method=method: information_flow(
            m, t, 3 if "logit" in method else None, method=method, layers=True, mask=k
        )
        for method in FLOW_METHODS
    },
    "flow_routes": lambda m, t, k: flow_routes(m, t, mask=k),
    "ov_matrices": lambda m, t, k: ov_matrices(m).singular_values(),
    "qk_matrices": lambda m, t, k: qk_matrices(m, distance=2, biases=True).frobenius(),
    "composition_scores": lambda m, t, k: composition_scores(m),
    "copying_traces": lambda m, t, k: copying_traces(m),
    "head_scores": lambda m, t, k: head_scores(m, t, mask=k),
    "virtual_head": lambda m, t, k: virtual_head(m, t, first=(0, 1), second=(1, 2), mask=k).weight,
    "bigram_logits": lambda m, t, k: bigram_logits(m, [3, 4]),
    "skip_trigrams": lambda m, t, k: skip_trigrams(m, (1, 2), [3, 4], 3),
    "movement_matrix": lambda m, t, k: movement_matrix(m, t, mask=k),
    "residual_gradients": lambda m, t, k: residual_gradients(m, t, 3, mask=k, capture="all"),
    "saliency": lambda m, t, k: feature_attribution(m, t, 3, mask=k, method="saliency"),
    "grad_x_input": lambda m, t, k: feature_attribution(m, t, 3, mask=k),
    "integrated_gradients": lambda m, t, k: feature_attribution(
        m, t, 3, mask=k, method="integrated_gradients", steps=4
    ),
    "integrated_gradients_doubling": lambda m, t, k: feature_attribution(
        m, t, 3, mask=k, method="integrated_gradients"
    ),
    "smooth_grad": lambda m, t, k: feature_attribution(
        m, t, 3, mask=k, method="smooth_grad", samples=3
    ),
    "occlusion": lambda m, t, k: feature_attribution(
        m, t, 3, mask=k, method="occlusion", step_batch=4
    ),
    "value_zeroing": lambda m, t, k: feature_attribution(m, t, 3, mask=k, method="value_zeroing"),
    **{
        f"target_{name}": lambda m, t, k, target=target: feature_attribution(
            m, t, target(t), mask=k
        )
        for name, target in TARGETS.items()
    },
    "attribution_patching": lambda m, t, k: attribution_patching(
        m, t, other(t), Logit(3, 4), sites=("resid_pre", "z", "q", "mlp_act"), mask=k
    ),
    "attribution_patching_star": lambda m, t, k: attribution_patching(
        m, t, other(t), 3, sites=("q", "k", "v"), method="atp_star", grad_drop=True, mask=k
    ),
    "edge_attribution": lambda m, t, k: edge_attribution(m, t, other(t), 3, mask=k),
    "edge_attribution_steps": lambda m, t, k: edge_attribution(
        m, t, other(t), 3, steps=3, step_batch=2, mask=k
    ),
    "patch_sweep": lambda m, t, k: patch_sweep(m, t, other(t), 3, mask=k, cell_batch=4),
    "patch_sweep_of_heads": lambda m, t, k: patch_sweep(
        m, t, other(t), 3, sites="z", over=("layer", "head"), mask=k
    ),
    "path_patching": lambda m, t, k: path_patching(m, t, other(t), 3, edges=EDGES, mask=k),
    "run_circuit": lambda m, t, k: run_circuit(
        m, t, other(t), 3, circuits=np.stack([Graph.of(m.config).edges] * 2), mask=k
    ),
    "token_faithfulness": lambda m, t, k: token_faithfulness(m, t, jnp.sin(t), 3, draws=2, mask=k),
    "agreement": lambda m, t, k: agreement(m.w_e[...], 2 * m.w_e[...]),
}
# By default, one or two of each room go through the dearer tests.
EVERY_ROOM = (
    "run", "resume", "decompose", "logit_attribution", "top_attribution", "logit_lens", "agreement",
    "information_flow_alti", "flow_routes", "movement_matrix_reduced", "copying_traces",
    "skip_trigrams", "virtual_head", "residual_gradients", "integrated_gradients", "patch_sweep",
    "attribution_patching_star", "edge_attribution", "run_circuit", "token_faithfulness",
)  # fmt: skip
# One way of using each public function: the others are compiled by the same entry.
ENTRIES = [name for name in TOOLS if hasattr(arrakis_jax, name)] + [
    "saliency", "integrated_gradients_doubling", "smooth_grad", "occlusion", "value_zeroing",
    "attribution_patching_star", "target_continuation",
]  # fmt: skip
# Of each kind of entry one: what the others run in bfloat16 is the same entry.
WITH_OPTIONS = ("run", "resume", "logit_attribution", "logit_lens", "movement_matrix",
                "head_scores", "residual_gradients", "patch_sweep")  # fmt: skip
# Without reverse-mode differentiation, as documented: loops whose length is traced, ranks.
FORWARD_ONLY = (
    "integrated_gradients_doubling", "patch_sweep", "patch_sweep_of_heads", "path_patching",
    "agreement",
)  # fmt: skip


def all_near(found, wanted, tolerance=1e-4):
    """Close to the largest value; what is rounding itself, such as `gap`, is near zero."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if np.abs(b).max() < 1e-5:
            assert np.abs(a).max() < 1e-5
        else:
            close(a, b, tolerance)


def test_gradients_at_every_site_cost_two_forwards():
    """At GPT-2 small shape, 8 x 128 tokens; neither side unembeds the vocabulary."""
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    forward = flops(lambda m, t: m(t, capture=("resid_pre", "resid_mid", "final")), m, tokens)
    by_hand = 12 * 8 * 128 * (24 * 768**2 + 4 * 128 * 768)
    assert forward == by_hand
    gradients = flops(lambda m, t: residual_gradients(m, t, 3, against=4), m, tokens)
    assert 1.9 < gradients / forward <= 2.1
    features = flops(lambda m, t: feature_attribution(m, t, 3, against=4), m, tokens)
    assert features / forward <= 2.1


def test_experts_cost_what_is_used_of_them():
    """8 of 128 experts: at most half as much again, for blocks that are not full."""
    config = config_for("qwen3_moe", num_hidden_layers=3)
    m = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
    d, h, g, k = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
    attention = 2 * d * (2 * h + 2 * g) * k + 4 * 128 * h * k
    experts = 6 * d * config.d_expert * config.experts_per_token
    rest = 3 * 8 * 128 * (attention + 2 * d * config.n_experts)
    forward = flops(lambda m, t: m(t, capture=("resid_pre", "resid_mid", "final")), m, tokens)
    assert rest + 3 * 8 * 128 * experts <= forward <= rest + 1.5 * 3 * 8 * 128 * experts
    gradients = flops(lambda m, t: residual_gradients(m, t, 3, against=4), m, tokens)
    assert gradients / forward <= 2.1
    for by in ("head", "neuron", "expert"):
        found = flops(lambda m, t, by=by: logit_attribution(m, t, 3, by=by), m, tokens)
        assert found / forward <= 1.05, by


def test_head_attribution_costs_one_forward():
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    forward = flops(lambda m, t: m(t, capture=("final",)), m, tokens)
    last = flops(lambda m, t: logit_attribution(m, t, 3, by="head"), m, tokens)
    everywhere = flops(lambda m, t: logit_attribution(m, t, t, by="head", position=None), m, tokens)
    assert last / forward < 1.01 and everywhere / forward < 1.1


ATTRIBUTIONS = {  # most forwards of products, most MB of temporary memory beyond a forward's
    "head": (1.09, 20),
    "source": (1.1, 100),
    "neuron": (1.33, 200),
}


@pytest.mark.parametrize("by", ATTRIBUTIONS)
def test_attribution_at_every_position_costs_one_forward(by):
    """At GPT-2 small shape, 8 x 128 tokens, of the next token; terms exist a layer at a time."""
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def forward(m, t):
        return m(t, capture=("final",)).residuals.final

    def tool(m, t):
        return logit_attribution(m, t, jnp.roll(t, -1, 1), by=by, position=None)

    times, megabytes = ATTRIBUTIONS[by]
    assert flops(tool, m, tokens) / flops(forward, m, tokens) <= times
    assert temporary(tool, m, tokens) - temporary(forward, m, tokens) <= megabytes * 1e6


def test_the_largest_neurons_need_no_room_for_the_others_past_norms_on_the_stream():
    """OPT-350m's shape: directions for each layer and position, a quarter of the terms, no term."""
    config = config_for(
        "opt", hidden_size=1024, word_embed_proj_dim=512, num_hidden_layers=24,
        num_attention_heads=16, ffn_dim=4096, do_layer_norm_before=False,
    )  # fmt: skip
    assert config.norm_placement == "stream_after"
    m = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def forward(m, t):
        return m(t, capture=("final",)).residuals.final

    def tool(m, t):
        return top_attribution(m, t, jnp.roll(t, -1, 1), 10, by="neuron", position=None).terms

    def last(m, t):
        return top_attribution(m, t, t[:, -1], 10, by="neuron").terms

    terms = 24 * 4096 * 8 * 128 * 4
    directions = 24 * 1024 * 8 * 128 * 4
    plain = temporary(forward, m, tokens)
    assert temporary(tool, m, tokens) - plain <= directions + terms / 8
    assert temporary(last, m, tokens) - plain <= terms / 12


def test_the_largest_neurons_need_no_room_for_the_others():
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def forward(m, t):
        return m(t, capture=("final",)).residuals.final

    def tool(m, t):
        return top_attribution(m, t, jnp.roll(t, -1, 1), 10, by="neuron", position=None).terms

    plain = flops(forward, m, tokens)
    assert flops(tool, m, tokens) / plain <= 1.4
    assert temporary(tool, m, tokens) - temporary(forward, m, tokens) <= 100e6
    for by in ("neuron", "source"):
        last = flops(lambda m, t, by=by: logit_attribution(m, t, 3, by=by), m, tokens)
        assert last / plain <= 1.02
    some = flops(
        lambda m, t: logit_attribution(m, t, t, by="neuron", position=None, layers=(3,)), m, tokens
    )
    assert some / plain <= 1.04


def test_value_weighted_flow_costs_one_forward():
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    forward = flops(lambda m, t: m(t, capture=("final",)), m, tokens)
    flow = flops(lambda m, t: information_flow(m, t, method="value_weighted"), m, tokens)
    assert flow / forward <= 1.15


@pytest.mark.parametrize("tool", TOOLS)
def test_every_float32_product_is_at_the_configs_precision(tool):
    m = model("gpt2")
    found = list(dots(jax.make_jaxpr(TOOLS[tool])(m, TOKENS, MASK).jaxpr))
    for eqn, _ in found:
        precision = eqn.params["precision"]
        highest = (jax.lax.Precision.HIGHEST,) * 2
        assert precision in (jax.lax.Precision.HIGHEST, highest), eqn
    if tool == "run":
        low = model("gpt2", matmul_precision="default")
        eqns = list(dots(jax.make_jaxpr(TOOLS[tool])(low, TOKENS, MASK).jaxpr))
        assert {str(eqn.params["precision"]) for eqn, _ in eqns} == {
            str((jax.lax.Precision.DEFAULT,) * 2)
        }


@pytest.mark.parametrize("tool", chosen(TOOLS, EVERY_ROOM))
def test_exports_for_tpu_and_cuda(tool):
    """Lowered for accelerators on the CPU, serialised, loaded."""
    exported(tool)


@pytest.mark.parametrize("tool", chosen(ENTRIES, WITH_OPTIONS))
def test_exports_run(tool):
    loaded, flat, args = exported(tool)
    all_near(loaded.call(*args), flat(*args))


def exported(tool):
    """The tool as it is loaded again, the function that was exported, and its arguments."""
    m = model("gpt2")
    leaves, structure = jax.tree.flatten(m)

    def flat(leaves, t, k):
        return jax.tree.leaves(TOOLS[tool](jax.tree.unflatten(structure, leaves), t, k))

    args = (leaves, jnp.asarray(TOKENS), jnp.asarray(MASK))
    program = export.export(jax.jit(flat), platforms=("cpu", "cuda", "tpu"))(*args)
    loaded = export.deserialize(program.serialize())
    assert len(loaded.out_avals) == len(jax.tree.leaves(jax.eval_shape(flat, *args)))
    return loaded, flat, args


@pytest.mark.filterwarnings("ignore:integrated gradients")  # its gap is bfloat16's rounding
@pytest.mark.parametrize("tool", chosen(ENTRIES, WITH_OPTIONS))
def test_bfloat16_under_jit_grad_and_scan(tool):
    """The entry with compiler options is for the outermost call only."""
    m = model("gpt2", dtype="bfloat16")

    def total(m):
        found = jax.tree.leaves(TOOLS[tool](m, TOKENS, MASK))
        return sum(
            x.astype(jnp.float32).sum() for x in found if jnp.issubdtype(x.dtype, jnp.inexact)
        )

    def scanned(m):
        return jax.lax.scan(lambda c, _: (c, total(m)), 0, None, length=1)[1][0]

    outer = total(m)
    assert np.isfinite(outer)
    if tool in FORWARD_ONLY:
        inner = jax.jit(scanned)(m)
    else:
        inner, gradient = jax.jit(jax.value_and_grad(scanned))(m)
        assert jax.tree.leaves(gradient)[0].dtype == jnp.bfloat16
    close(inner, outer, 0.1)


def test_bfloat16_is_close_and_its_attribution_exact():
    m32 = model("gpt2")
    m = model("gpt2", dtype="bfloat16")
    out = run(m, TOKENS, mask=MASK, capture="all")
    assert out.logits.dtype == out.residuals.resid_pre.dtype == jnp.float32
    assert out.residuals.z.dtype == jnp.float32
    close(out.logits, run(m32, TOKENS, mask=MASK).logits, 5e-2)
    fast = model("gpt2", dtype="bfloat16", matmul_precision="default")
    assert run(fast, TOKENS, mask=MASK, capture="all").residuals.z.dtype == jnp.bfloat16
    close(run(fast, TOKENS, mask=MASK).logits, out.logits, 3e-2)
    for by in ("component", "head", "neuron"):
        for one in (m, fast):
            assert logit_attribution(one, TOKENS, 3, by=by, mask=MASK).gap.max() < 1e-5


def test_bfloat16_weights_are_exact_unless_speed_is_asked_for():
    """In float32 with the same rounded weights, the numbers are the same."""
    m = model("gpt_oss", dtype="bfloat16")
    wide = model("gpt_oss")
    leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(m)]
    wide = jax.tree.unflatten(jax.tree.structure(wide), leaves)
    close(run(m, TOKENS, mask=MASK).logits, run(wide, TOKENS, mask=MASK).logits, 1e-5)


def test_the_compiler_options_are_a_callers_too():
    m = model("gpt2", dtype="bfloat16")
    call = jax.jit(
        lambda m, t: run(m, t, capture=("final",)).residuals.final,
        compiler_options=cpu_compiler_options(),
    )
    close(call(m, TOKENS), run(m, TOKENS).residuals.final, 5e-2)


@pytest.mark.parametrize("tool", chosen(TOOLS, EVERY_ROOM))
def test_float64_is_float64_everywhere(tool, x64):
    """Traced and not run: the tests of each tool compare it in float64."""
    found = jax.eval_shape(TOOLS[tool], model("llama3", dtype="float64"), TOKENS, MASK)
    for leaf in jax.tree.leaves(found):
        assert leaf.dtype in (jnp.float64, jnp.int32, jnp.int64, bool)


SHARDED = (
    "logit_attribution", "logit_attribution_by_source", "top_attribution", "attribute_to",
    "attribute_movement", "logit_lens", "residual_gradients", "movement_matrix", "linear_cka",
    "information_flow_value_weighted", "information_flow_alti_logit_complete", "flow_routes",
    "composition_scores", "head_scores", "saliency", "integrated_gradients", "occlusion",
    "target_kl", "attribution_patching", "attribution_patching_star", "edge_attribution",
    "patch_sweep_of_heads", "path_patching", "run_circuit", "token_faithfulness",
)  # fmt: skip


@pytest.mark.parametrize("tool", chosen(SHARDED, WITH_OPTIONS))
def test_sharded_model_gives_the_same_numbers(tool):
    """Eight virtual devices: batch on `data`, heads and hidden widths on `model`."""
    from arrakis_jax.checkpoint import partition

    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=axes)
    m = model("gpt2", n_heads=8, n_kv_heads=8)
    paths, structure = jax.tree_util.tree_flatten_with_path(m)

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        spec = partition(name, leaf.shape, mesh)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    sharded = jax.tree.unflatten(structure, [place(*item) for item in paths])
    data = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    tokens, mask = (jax.device_put(x, data) for x in (TOKENS, MASK))
    all_near(TOOLS[tool](sharded, tokens, mask), TOOLS[tool](m, TOKENS, MASK), 1e-5)
