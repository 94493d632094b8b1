"""flow_routes against a search through the graph of all importances, in float64."""

import jax
import jax.numpy as jnp
import networkx
import numpy as np
import pytest

from arrakis_jax import NotCapturedError, run
from arrakis_jax.movement import contributions
from arrakis_jax.movement.flow_routes import flow_routes
from tests.cost import arrays
from tests.induction import N, induction_model, induction_tokens
from tests.models import batch, chosen, close, compilations, model
from tests.movement.brute import alone, brought, importances

KINDS = (
    "llama", "gpt2", "no_norm", "attention_only", "one_layer", "post", "both", "post_layernorm",
    "parallel", "shared_norm", "stream_after", "stream_before", "stream_mixed", "stream_rms",
    "scaled", "moe", "mixed", "gpt_oss",
)  # fmt: skip


def searched(m, layers, columns, position, threshold):
    """Every edge above the threshold, and of these the ones that lead to the position."""
    everything, n = networkx.MultiDiGraph(), len(layers)

    def before(i, t):
        return ("resid_post", i - 1, columns[t]) if i else ("embed", columns[t])

    def add(a, b, kind, weight, head=None):
        if weight > threshold:
            everything.add_edge(a, b, key=(kind, head), weight=weight)

    for i, layer in enumerate(layers):
        attn, own, mlp, kept = importances(m, layer)
        for t, column in enumerate(columns):
            after, node = ("resid_post", i, column), ("mlp", i, column)
            mid = after if kept is None else ("resid_mid", i, column)
            add(before(i, t), mid, "residual", own[t])
            for s, h in np.ndindex(attn.shape[1:]):
                add(before(i, s), mid, "attn", attn[t, s, h], h)
            if mlp is not None:
                add(node, after, "mlp", mlp[t])
                add(before(i, t) if kept is None else mid, node, "read", 1 * (mlp[t] > threshold))
            if kept is not None:
                add(mid, after, "residual", kept[t])
    end = before(n, position)
    everything.add_node(end)
    reached = {end} | networkx.ancestors(everything, end)
    return everything.subgraph(reached).copy()


def edges_of(graph):
    return {(a, b, key): w for a, b, key, w in graph.edges(keys=True, data="weight")}


@pytest.mark.parametrize("variant", chosen(KINDS))
def test_against_a_search_through_all_importances(variant, x64):
    m = model(variant, dtype="float64")
    tokens, mask, prompts = batch(side="both")
    r = run(m, tokens, mask=mask, capture="all").residuals
    positions = np.array([-1, 3, -1, 0, 2])
    for threshold in (1e-9, 0.1):
        found = flow_routes(m, r, positions, threshold)
        for b, prompt in enumerate(prompts):
            columns, at = np.flatnonzero(mask[b]).tolist(), alone(r, b)
            layers = brought(m, at)
            wanted = searched(m, layers, columns, range(len(prompt))[positions[b]], threshold)
            graph = found.graph(b)
            ours, theirs = edges_of(graph), edges_of(wanted)
            assert set(graph) == set(wanted) and set(ours) == set(theirs)
            np.testing.assert_allclose(
                [ours[edge] for edge in theirs], list(theirs.values()), atol=1e-10
            )
            reads = sum(key[0] == "read" for _, _, key in theirs)
            assert found.edge_count[b] == len(theirs) - reads
            inputs = [node[1] for node in wanted if node[0] == "embed"]
            assert np.flatnonzero(found.inputs[b]).tolist() == sorted(inputs)
            for i, layer in enumerate(layers):
                attn, own, mlp, kept = importances(m, layer)
                pairs = ((own, "residual_attn"), (mlp, "mlp"), (kept, "residual_mlp"))
                for value, name in pairs:
                    if value is None:
                        assert getattr(found, name) is None
                    else:
                        close(np.asarray(getattr(found, name))[i, b, mask[b]], value, 1e-10)
                order = np.sort(attn.reshape(len(columns), -1))[:, ::-1]
                k = min(order.shape[1], found.weight.shape[-1])
                ours = np.asarray(found.weight)[i, b, mask[b]]
                np.testing.assert_allclose(ours[:, :k], order[:, :k], atol=1e-10)
                assert not ours[:, k:].any()
    for x in (found.weight, found.residual_attn):
        assert not np.asarray(x)[:, ~mask].any()


def test_importances_of_a_step_sum_to_one(x64):
    for variant in ("gpt2", "parallel", "attention_only"):
        m = model(variant, dtype="float64")
        tokens, mask, _ = batch()
        found = flow_routes(m, tokens, threshold=0, mask=mask)
        attention = found.weight.sum(-1) + found.residual_attn
        if variant == "parallel":
            attention = attention + found.mlp
        if variant == "gpt2":
            each = found.mlp + found.residual_mlp
            np.testing.assert_allclose(each, np.broadcast_to(mask, each.shape), atol=1e-12)
        wanted = np.broadcast_to(mask, attention.shape)
        np.testing.assert_allclose(attention, wanted, atol=1e-12)
        first = np.asarray(found.weight.sum(-1) + found.residual_attn)
        assert found.weight.shape[-1] == mask.shape[1] * 6 and first.max() <= 1 + 1e-12


def test_a_higher_threshold_keeps_fewer_of_the_same(x64):
    m = model("llama", dtype="float64")
    tokens, mask, _ = batch()
    held, counts = None, []
    for threshold in (0, 0.01, 0.03, 0.1, 0.5, 1):
        found = flow_routes(m, tokens, threshold=threshold, mask=mask)
        now = [set(edges_of(found.graph(b))) for b in range(len(tokens))]
        assert held is None or all(a <= b for a, b in zip(now, held, strict=True))
        held, counts = now, [*counts, int(found.edge_count.sum())]
    assert counts[0] > counts[2] > counts[3] > counts[-1] == 0
    assert found.weight.shape[-1] == 1 and not found.inputs.any()
    assert list(found.graph(0)) == [("resid_post", 2, int(found.column[0]))]


def test_the_induction_circuit_is_found(x64):
    """Token A at s - 1, moved to s by layer 0, matched from t, whose copy of s is the answer."""
    m, tokens = induction_model(), induction_tokens()
    for t in range(N + 1, 2 * N):
        found = flow_routes(m, tokens, t, 0.04)
        s = t - N + 1
        for b in range(len(tokens)):
            attn = {
                (a, c, head) for a, c, (kind, head) in found.graph(b).edges(keys=True)
                if kind == "attn"
            }  # fmt: skip
            assert {
                (("resid_post", 0, s), ("resid_post", 1, t), 0),
                (("embed", s - 1), ("resid_post", 0, s), 0),
                (("embed", t - 1), ("resid_post", 0, t), 0),
            } == attn
            assert np.flatnonzero(found.inputs[b]).tolist() == sorted({s - 1, s, t - 1, t})


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padded_equals_one_by_one(side, x64):
    m = model("gpt_oss", dtype="float64")
    tokens, mask, prompts = batch(side=side, lengths=(5, 7, 1))
    positions = np.array([-1, 2, 0])
    found = flow_routes(m, tokens, positions, mask=mask)
    for b, prompt in enumerate(prompts):
        one = flow_routes(m, prompt[None], positions[b])
        columns = np.flatnonzero(mask[b]).tolist()

        def moved(node, columns=columns):
            return (*node[:-1], columns[node[-1]])

        there = {(moved(a), moved(c), k): w for (a, c, k), w in edges_of(one.graph(0)).items()}
        here = edges_of(found.graph(b))
        assert set(here) == set(there) and here
        np.testing.assert_allclose([here[e] for e in there], list(there.values()), atol=1e-10)
        assert found.edge_count[b] == one.edge_count[0]
        np.testing.assert_array_equal(np.asarray(found.inputs)[b, mask[b]], one.inputs[0])


@pytest.mark.parametrize("variant", ["mixed", "parallel"])
def test_run_captured_and_in_a_callers_jit(variant):
    m = model(variant)
    tokens, mask, _ = batch()
    found = flow_routes(m, tokens, 0, 0.1, mask=mask)
    out = run(m, tokens, mask=mask, capture="all")
    inside = jax.jit(lambda t, p: flow_routes(m, t, p, 0.1, mask=mask))(tokens, jnp.asarray(0))
    for again in (flow_routes(m, out, 0, 0.1), inside):
        for name in ("weight", "residual_attn", "mlp"):
            close(getattr(again, name), getattr(found, name), 1e-4)
        for name in ("kept", "inputs", "edge_count"):
            np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


def test_compiles_once_for_positions_and_near_thresholds():
    m = model()
    tokens, mask, _ = batch()
    flow_routes(m, tokens, -1, 0.04, mask=mask)
    with compilations() as names:
        flow_routes(m, tokens[:, ::-1].copy() % 31, np.zeros(5, int), 0.05, mask=mask)
    assert names == []


def test_one_token_and_no_layer(x64):
    for n_layers in (1, 0):
        m = model("gpt2", dtype="float64", n_layers=n_layers)
        found = flow_routes(m, [[5]], threshold=0)
        graph = found.graph(0)
        assert found.inputs.all() and found.column.tolist() == [0]
        assert ("embed", 0) in graph and len(found.weight) == n_layers
        assert found.edge_count[0] == graph.number_of_edges() - n_layers  # one "read" each


def test_vectors_exist_for_a_block_of_pairs(monkeypatch):
    b, t, d = 2, 60, 20
    monkeypatch.setattr(contributions, "PAIR_ELEMENTS", 6 * b * d * 100)
    jaxpr = jax.make_jaxpr(lambda t: flow_routes(model(), t))(
        jax.ShapeDtypeStruct((b, t), jnp.int32)
    )
    assert max(arrays(jaxpr.jaxpr)) <= b * t * t * 6  # that of the pattern


def test_bad_input():
    m, tokens = model(), np.arange(4)[None]
    for threshold in (-0.1, 1.5, "0.1", True, float("nan"), None):
        with pytest.raises(ValueError, match=r"`threshold` must be a number in \[0, 1\]"):
            flow_routes(m, tokens, threshold=threshold)
    with pytest.raises(ValueError, match="known before tracing"):
        jax.jit(lambda x: flow_routes(m, tokens, threshold=x).weight)(0.1)
    with pytest.raises(IndexError, match=r"`position` must be in \[-4, 4\)"):
        flow_routes(m, tokens, 4)
    with pytest.raises(IndexError, match=r"`b` must be in \[-1, 1\), got 1"):
        flow_routes(m, tokens).graph(1)
    with pytest.raises(NotCapturedError, match="'pattern'"):
        flow_routes(m, run(m, tokens))
    with pytest.raises(ValueError, match="must be a batch"):
        flow_routes(m, run(m, tokens, capture="all").residuals.example(0))
