"""Circuits: every reader's input put together by hand, single edges, and the induction circuit."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from jax import export

from arrakis_jax import Add, Logit, Set, run
from arrakis_jax.edges.circuit import circuit_faithfulness, run_circuit
from arrakis_jax.edges.edge_attribution import edge_attribution
from arrakis_jax.edges.graph import WRITTEN, Graph, Node, writer_changes
from arrakis_jax.edges.select import greedy_edges, pruned, top_edges
from tests.cost import flops
from tests.induction import N, V, induction_model
from tests.models import chosen, close, compilations, gpt2_small, model
from tests.patching.others import TARGET, pairs

SITES = {"q": "q_in", "k": "k_in", "v": "v_in", "mlp": "mlp_in", "final": "final"}


def measured(logits, mask):
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    rows = np.asarray(logits)[np.arange(len(mask)), last]
    return rows[:, 3] - rows[:, 4]


def random_circuits(graph, n, share=0.6, seed=0):
    return (np.random.default_rng(seed).random((n, *graph.edges.shape)) < share) & graph.edges


VARIANTS = {
    **dict.fromkeys(("post", "parallel", "shared_norm"), {}),
    "both": dict(window_layers=(True, False)),
    "mixed": dict(moe_layers=(False, True)),
}


@pytest.mark.parametrize("variant", chosen(VARIANTS, ["shared_norm", "both", "mixed"]))
def test_all_edges_are_the_clean_run_and_none_the_corrupt(variant, x64):
    m = model(variant, dtype="float64", n_layers=2, **VARIANTS[variant])
    clean, corrupt, mask, *_ = pairs()
    graph = Graph.of(m.config)
    ends = np.stack([graph.edges, np.ones_like(graph.edges), np.zeros_like(graph.edges)])
    found = run_circuit(m, clean, corrupt, TARGET, circuits=ends, mask=mask)
    for row, tokens in zip(found, (clean, clean, corrupt), strict=True):
        wanted = measured(run(m, tokens, mask=mask, capture=("logits",)).logits, mask)
        np.testing.assert_allclose(row, wanted, atol=1e-10)


def by_hand(m, clean, corrupt, mask, circuit):
    """The target of one circuit: readers' inputs set in ordinary runs, one after another."""
    graph, config = Graph.of(m.config), m.config
    fields = ("embed", "resid_pre", "resid_mid", "z", "attn_out", "mlp_out", "final",
              "norm_attn_out_scale", "logits")  # fmt: skip
    other = run(m, corrupt, mask=mask, capture=fields).residuals
    w_o, norm = np.asarray(m.blocks.attn.w_o[...]), m.blocks.norm_attn_out
    zeros = np.zeros(other.embed.shape)

    def writes(stream, layer):
        """Those of the heads, as shares of what passes the norm."""
        heads = np.einsum("BTHK,HKD->HBTD", stream.z[layer], w_o[layer])
        heads = (heads - heads.mean(-1, keepdims=True)) * np.asarray(norm.w[layer])
        return heads / np.asarray(stream.norm_attn_out_scale)[layer, ..., None]

    n_of = {"q": config.n_heads, "k": config.n_kv_heads, "v": config.n_kv_heads}
    inputs = {
        (kind, layer): np.zeros((*zeros.shape[:2], n_of[kind], zeros.shape[2]))
        if kind in n_of
        else zeros.copy()
        for layer in range(config.n_layers)
        for kind in ("q", "k", "v", "mlp")
    } | {("final", None): zeros.copy()}

    def now():
        edits = tuple(Set(SITES[kind], x, layer=layer) for (kind, layer), x in inputs.items())
        return run(m, clean, mask=mask, capture=fields, edits=edits)

    changes = [np.asarray(run(m, clean, mask=mask).residuals.embed - other.embed)]
    rest = zeros.copy()
    stage = None
    for reader, row in zip(graph.readers, circuit, strict=True):
        at = (reader.layer, reader.kind == "mlp")
        if at != stage and reader.kind in ("mlp", "q", "final"):
            before, stage = stage, at
            if before is not None and before[0] is not None:
                layer, was_mlp = before
                stream = now().residuals
                if was_mlp:
                    changes.append(np.asarray(stream.mlp_out - other.mlp_out)[layer])
                else:
                    own = [*(writes(stream, layer) - writes(other, layer))]
                    changes += own
                    rest += np.asarray(stream.attn_out - other.attn_out)[layer] - sum(own)
        x = {"mlp": other.resid_mid, "final": other.final}.get(reader.kind, other.resid_pre)
        x = np.asarray(x if reader.layer is None else x[reader.layer]) + rest
        x = x + sum(change for change, there in zip(changes, row, strict=False) if there)
        if reader.head is None:
            inputs[reader.kind, reader.layer][...] = x
        else:
            inputs[reader.kind, reader.layer][:, :, reader.head] = x
    return measured(now().logits, mask)


def test_every_reader_by_hand(x64):
    """A norm of the output with biases, and key/value heads that are shared."""
    m = model("post_layernorm", dtype="float64", n_layers=2, n_kv_heads=3)
    clean, corrupt, mask, *_ = pairs()
    circuits = random_circuits(Graph.of(m.config), 2)
    found = run_circuit(m, clean, corrupt, TARGET, circuits=circuits, mask=mask)
    for row, circuit in zip(found, circuits, strict=True):
        np.testing.assert_allclose(row, by_hand(m, clean, corrupt, mask, circuit), atol=1e-10)
    assert np.abs(found[0] - found[1]).min() > 1e-3


def test_without_one_edge(x64):
    """The reader then reads the other run's write: an edit of an ordinary run."""
    m = model("llama3", dtype="float64", n_layers=2)
    clean, corrupt, mask, *_ = pairs()
    graph = Graph.of(m.config)
    streams = [run(m, t, mask=mask, capture=WRITTEN).residuals for t in (clean, corrupt)]
    changes = jax.jit(lambda m, a, b: writer_changes(m, a, b, linear=False))(m, *streams)
    edges = [
        (Node(None, "embed"), Node(1, "k", 2)),
        (Node(0, "head", 5), Node(0, "mlp")),
        (Node(0, "mlp"), Node(1, "q", 4)),
        (Node(1, "mlp"), Node(None, "final")),
    ]
    circuits = np.repeat(graph.edges[None], len(edges), 0)
    where = [(graph.index(r, "readers"), graph.index(w, "writers")) for w, r in edges]
    for circuit, at in zip(circuits, where, strict=True):
        assert circuit[at]
        circuit[at] = False
    found = run_circuit(m, clean, corrupt, TARGET, circuits=circuits, mask=mask)
    for row, (writer, reader), (_, w) in zip(found, edges, where, strict=True):
        edit = Add(SITES[reader.kind], changes[w], layer=reader.layer, head=reader.head)
        out = run(m, clean, mask=mask, edits=edit, capture=("logits",))
        np.testing.assert_allclose(row, measured(out.logits, mask), atol=1e-12, err_msg=str(writer))


def test_the_induction_circuit(x64):
    """G4: seven edges do all of it, five of them cannot be missed; EAP does not see one of these.

    The softmax is saturated: taking the previous-token head from the keys of the induction head
    removes the whole logit, of which the gradient shows nothing.
    """
    m, position = induction_model(), 2 * N - 1
    rng = np.random.default_rng(0)
    once = np.stack([1 + rng.permutation(V - 1)[:N] for _ in range(3)])
    clean = np.concatenate([np.zeros((3, 1), int), once, once], 1)
    corrupt = np.where(clean > 0, clean % (V - 1) + 1, 0)
    target = Logit(clean[:, position + 1], position=position)
    graph = Graph.of(m.config)
    embed, first, second = graph.writers
    circuit = [
        (embed, Node(0, "v", 0)), (first, Node(1, "k", 0)), (embed, Node(1, "q", 0)),
        (embed, Node(1, "v", 0)), (second, Node(None, "final")),
        (embed, Node(0, "q", 0)), (embed, Node(0, "k", 0)),
    ]  # fmt: skip
    where = [(graph.index(r, "readers"), graph.index(w, "writers")) for w, r in circuit]
    whole = np.zeros(graph.edges.shape, bool)
    whole[tuple(np.transpose(where))] = True
    masks = np.repeat(whole[None], 8, 0)
    for mask, at in zip(masks[1:], where, strict=True):
        mask[at] = False
    found = run_circuit(m, clean, corrupt, target, circuits=masks)
    wanted = np.array([1, 0, 0, 0, 0, 0, 1, 1])[:, None] * np.ones(3)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    np.testing.assert_array_equal(pruned(whole, graph), whole)
    score = circuit_faithfulness(
        m,
        clean,
        corrupt,
        target,
        scores=whole.astype(float),
        fractions=(7 / graph.edges.sum(), 1.0),
    )
    np.testing.assert_allclose(score.faithfulness, 1, atol=1e-12)
    np.testing.assert_array_equal(score.n_edges, [7, graph.edges.sum()])
    effects = edge_attribution(m, clean, corrupt, target).effects
    assert np.abs(effects[where[1]]).max() < 1e-9
    np.testing.assert_allclose(effects[where[4]], -1, atol=1e-9)


def naive_greedy(scores, n, graph):
    group = graph.n_heads // graph.n_kv_heads
    chosen = np.zeros(scores.shape, bool)
    for _ in range(n):
        connected = {Node(None, "final")}
        for w in np.flatnonzero(chosen.any(0)):
            layer, kind, head = graph.writers[w]
            if kind == "head":
                connected |= {Node(layer, "q", head), Node(layer, "k", head // group)}
                connected |= {Node(layer, "v", head // group)}
            elif kind == "mlp":
                connected |= {Node(layer, "mlp")}
        free = graph.edges & ~chosen & np.array([r in connected for r in graph.readers])[:, None]
        best = np.where(free, np.abs(scores), -1)
        chosen[np.unravel_index(np.argmax(best), best.shape)] = True
    return chosen


def test_selection():
    graph = Graph.of(model("llama", n_layers=2).config)
    scores = np.random.default_rng(0).normal(size=graph.edges.shape).round(1)  # with ties
    there = np.flatnonzero(graph.edges)
    flat = np.abs(scores.reshape(-1))
    ordered = sorted(there, key=lambda i: (-flat[i], i))
    for n in (0, 1, 40, len(there)):
        assert set(np.flatnonzero(top_edges(scores, n, graph))) == set(ordered[:n])
        np.testing.assert_array_equal(
            greedy_edges(scores, n, graph), naive_greedy(scores, n, graph)
        )
    signed = top_edges(scores, 3, graph, by="signed")
    assert scores[signed].min() >= np.sort(scores[graph.edges])[-3]
    np.testing.assert_array_equal(greedy_edges(scores, len(there), graph), graph.edges)
    np.testing.assert_array_equal(pruned(graph.edges, graph), graph.edges)


def test_pruning_keeps_paths_from_the_embedding_to_the_output(x64):
    m = model("llama", n_layers=2, dtype="float64")
    graph, group = Graph.of(m.config), 2
    circuits = random_circuits(graph, 3, share=0.08)
    for mask in circuits:
        network = nx.DiGraph([("embed", Node(None, "final"))])
        for r, w in np.argwhere(mask):
            network.add_edge(("out", graph.writers[w]), graph.readers[r])
        for node in graph.writers:
            layer, kind, head = node
            if kind == "head":
                for reader in ("q", head), ("k", head // group), ("v", head // group):
                    network.add_edge(Node(layer, *reader), ("out", node))
            elif kind == "mlp":
                network.add_edge(Node(layer, "mlp"), ("out", node))
        network.add_node(("out", graph.writers[0]))
        start = ("out", graph.writers[0])
        after = nx.descendants(network, start) | {start}
        before = nx.ancestors(network, Node(None, "final")) | {Node(None, "final")}
        wanted = mask & [
            [("out", w) in after and r in before for w in graph.writers] for r in graph.readers
        ]
        np.testing.assert_array_equal(pruned(mask, graph), wanted)
        assert wanted.sum() < mask.sum()
    clean, corrupt, mask, *_ = pairs()
    both = np.concatenate([circuits, [pruned(c, graph) for c in circuits]])
    found = run_circuit(m, clean, corrupt, TARGET, circuits=both, mask=mask)
    np.testing.assert_allclose(found[:3], found[3:], atol=1e-12)


def test_faithfulness():
    m = model("gpt2", n_layers=2)
    clean, corrupt, mask, *_ = pairs()
    graph = Graph.of(m.config)
    effects = edge_attribution(m, clean, corrupt, TARGET, mask=mask, steps=2).effects.mean(-1)
    call = (m, clean, corrupt, TARGET)
    found = circuit_faithfulness(*call, scores=effects, mask=mask)
    f = np.asarray(found.of_means)
    assert found.faithfulness.shape == (10, 2) and abs(f[-1] - 1) < 1e-5
    close(found.faithfulness[-1], np.ones(2), 1e-5)
    gap = found.clean.mean() - found.corrupt.mean()
    close(f, (found.target.mean(-1) - found.corrupt.mean()) / gap, 1e-6)
    k = np.array(found.fractions)
    close(found.cpr, (np.diff(k) * (f[1:] + f[:-1]) / 2).sum(), 1e-5)
    g = np.abs(1 - f)
    close(found.cmd, (np.diff(k) * (g[1:] + g[:-1]) / 2).sum(), 1e-5)
    table = found.to_table()
    assert table["fraction"] == list(k) and table["edges"][-1] == graph.edges.sum()
    np.testing.assert_allclose(table["faithfulness"], f, rtol=1e-6)
    rows = run_circuit(m, clean, corrupt, TARGET, circuits=found.circuits, mask=mask)
    np.testing.assert_array_equal(rows, found.target)
    with compilations() as names:
        greedy = circuit_faithfulness(*call, scores=effects, mask=mask, select="greedy")
        signed = circuit_faithfulness(*call, scores=effects, mask=mask, by="signed")
    assert not [name for name in names if "_run_circuits" in name]
    few = round(0.1 * graph.edges.sum())
    kept = greedy_edges(effects, few, graph)
    np.testing.assert_array_equal(greedy.circuits[6], pruned(kept, graph))
    assert kept.sum() == few > greedy.n_edges[6] > 0
    kept = top_edges(-np.asarray(effects), few, graph, by="signed")
    np.testing.assert_array_equal(signed.circuits[6], pruned(kept, graph))


def test_padded_equals_one_by_one(x64):
    m = model("post", dtype="float64", n_layers=1)
    clean, corrupt, mask, prompts, others = pairs((4, 1), side="both")
    circuits = random_circuits(Graph.of(m.config), 2)
    found = run_circuit(m, clean, corrupt, TARGET, circuits=circuits, mask=mask)
    for b, (prompt, other) in enumerate(zip(prompts, others, strict=True)):
        alone = run_circuit(m, prompt[None], other[None], TARGET, circuits=circuits)
        np.testing.assert_allclose(found[:, b], alone[:, 0], atol=1e-10)


def test_exports():
    m = model("llama", n_layers=1)
    clean, corrupt, mask, *_ = pairs()
    circuits = random_circuits(Graph.of(m.config), 2)
    leaves, structure = jax.tree.flatten(m)

    def flat(leaves, clean, corrupt, mask, circuits):
        m = jax.tree.unflatten(structure, leaves)
        return run_circuit(m, clean, corrupt, TARGET, circuits=circuits, mask=mask)

    args = (leaves, *(jnp.asarray(x) for x in (clean, corrupt, mask, circuits)))
    exported = export.export(jax.jit(flat), platforms=("cpu", "cuda", "tpu"))(*args)
    found = run_circuit(m, clean, corrupt, TARGET, circuits=circuits, mask=mask)
    close(export.deserialize(exported.serialize()).call(*args), found, 1e-5)


def test_cost():
    """In forwards at GPT-2 small shape: two to start with, one and the contraction for each."""
    m, tokens = gpt2_small(), jax.ShapeDtypeStruct((8, 128), jnp.int32)
    forward = flops(lambda m, t: m(t, capture=("final",)), m, tokens)
    circuits = jax.ShapeDtypeStruct((10, *Graph.of(m.config).edges.shape), bool)

    def tool(m, t, c, circuits):
        return run_circuit(m, t, c, TARGET, circuits=circuits)

    assert flops(tool, m, tokens, tokens, circuits) / forward <= 2 + 10 * 1.75


def test_bad_input():
    m = model("gpt2", n_layers=1)
    graph, tokens = Graph.of(m.config), np.arange(4)[None]
    every, scores = graph.edges[None], np.ones(graph.edges.shape)

    def call(circuits):
        return run_circuit(m, tokens, tokens, 3, circuits=circuits)

    def faithfulness(scores=scores, **options):
        return circuit_faithfulness(m, tokens, tokens, 3, scores=scores, **options)

    for function, error, message in [
        (lambda: call(graph.edges), ValueError, r"add an axis with circuits\[None\]"),
        (lambda: call(every[:, 1:]), ValueError, r"`circuits` must be \[N, 20, 8\]"),
        (lambda: call(every.astype(int)), TypeError, "`circuits` must be bool"),
        (lambda: faithfulness("all"), TypeError, "such as edge_attribution"),
        (lambda: faithfulness(scores[None]), ValueError, "take the mean over examples"),
        (lambda: faithfulness(scores * np.nan), ValueError, "`scores` must be finite"),
        (lambda: faithfulness(fractions=(0.5, 0.1)), ValueError, "`fractions` must be ascending"),
        (lambda: faithfulness(fractions=()), ValueError, "`fractions` must be ascending"),
        (lambda: faithfulness(fractions=(0.5, 2)), ValueError, "`fractions` must be ascending"),
        (lambda: faithfulness(select="best"), ValueError, "`select` must be one of"),
        (lambda: faithfulness(by="size"), ValueError, "`by` must be one of"),
        (lambda: faithfulness(base="other"), ValueError, "`base` must be one of"),
        (lambda: top_edges(scores, 999, graph), ValueError, r"`n` must be an int in \[0, "),
        (lambda: greedy_edges(scores, -1, graph), ValueError, r"`n` must be an int in \[0, "),
    ]:
        with pytest.raises(error, match=message):
            function()
