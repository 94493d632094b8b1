"""path_patching: every kind of edge against the run with that one edit, and exact cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import Add, run
from arrakis_jax.edges.graph import Graph, Node
from arrakis_jax.edges.path_patching import path_patching
from arrakis_jax.forward.targets import Logit
from arrakis_jax.patching.patch_sweep import patch_sweep
from tests.induction import N, induction_model, induction_tokens
from tests.models import chosen, close, compilations, model
from tests.patching.single import CAPTURE, TARGET, edited, linear, pairs, target_of, written

EMBED, FINAL = (None, "embed"), (None, "final")


@pytest.fixture
def tokens():
    return induction_tokens()


def one_by_one(m, base, source, mask, edges):
    """The definition: a run with what the writer changes added to what the reader reads.

    Nothing is added for other kinds of readers, so that one program serves all.
    """
    before = target_of(run(m, base, mask=mask, capture=CAPTURE).logits, mask)
    kinds = dict.fromkeys(kind for _, (_, kind, *_) in edges)
    found = []
    for writer, (layer, kind, *head) in edges:
        change = written(m, base, source, mask, writer)
        edits = []
        for k in kinds:
            where = {} if k == "final" else {"layer": jnp.asarray(layer or 0)}
            where |= {"head": jnp.asarray((head or [0])[0])} if k in ("q", "k", "v") else {}
            added = change if k == kind else jnp.zeros_like(change)
            edits.append(Add("final" if k == "final" else f"{k}_in", added, **where))
        after = edited(m, base, mask, tuple(edits))
        found.append(target_of(after, mask) - before)
    return np.array(found)


CASES = {
    "both": [
        (EMBED, (0, "q", 5)), ((0, "head", 2), (1, "k", 2)), ((1, "head", 4), (1, "mlp")),
        ((0, "mlp"), (2, "v", 1)), ((2, "head", 3), FINAL), ((2, "mlp"), FINAL),
    ],
    "parallel": [((0, "head", 1), (1, "mlp")), (EMBED, (2, "k", 5)), ((1, "mlp"), (2, "k", 0))],
    "mixed": [((0, "head", 1), (1, "v", 2)), ((1, "head", 4), (2, "v", 0))],
}  # fmt: skip


@pytest.mark.parametrize("variant", chosen(CASES, ["both", "parallel"]))
def test_every_edge_is_a_run_with_one_edit(variant, x64):
    m, edges = model(variant, dtype="float64"), CASES[variant]
    clean, corrupt, mask, prompts = pairs()
    found = path_patching(m, clean, corrupt, TARGET, edges=edges, mask=mask)
    want = one_by_one(m, clean, corrupt, mask, edges)
    assert (np.abs(want) > 1e-4).all()
    close(found.effects, want, 1e-10)
    for own, value in ((clean, found.base), (corrupt, found.source)):
        close(value, target_of(run(m, own, mask=mask, capture=CAPTURE).logits, mask), 1e-12)
    if variant == "parallel":
        back = path_patching(m, clean, corrupt, TARGET, edges=edges, mask=mask, base="corrupt")
        close(back.effects, one_by_one(m, corrupt, clean, mask, edges), 1e-10)
    if variant == "both":
        one, other = prompts[1]
        alone = path_patching(m, one[None], other[None], TARGET, edges=edges)
        close(found.effects[:, 1], alone.effects[:, 0], 1e-10)


def test_the_edges_of_a_writer_add_up_in_a_linear_network(x64):
    """To the exact effect of the writer; the one to the final norm is its direct effect."""
    m = linear()
    clean, corrupt, mask, _ = pairs()
    graph = Graph.of(m.config)
    heads = [(0, "head", h) for h in range(m.config.n_heads)]
    edges = [
        (writer, reader)
        for writer in (EMBED, *heads, (1, "mlp"))
        for r, reader in enumerate(graph.readers)
        if graph.edges[r, graph.index(writer, "writers")]
    ]
    found = path_patching(m, clean, corrupt, TARGET, edges=edges, mask=mask)
    nodes = patch_sweep(
        m, clean, corrupt, TARGET, sites=("z", "mlp_out"), over="layer", mask=mask
    ).effects
    last = [np.flatnonzero(row)[-1] for row in mask]
    direction = m.unembedding(jnp.array(3)) - m.unembedding(jnp.array(4))
    for writers, effect in (
        ([EMBED], found.source - found.base),
        (heads, nodes["z"][0]),
        ([(1, "mlp")], nodes["mlp_out"][1]),
    ):
        own = [
            i for i, edge in enumerate(found.labels) if edge.writer in {Node(*w) for w in writers}
        ]
        close(np.asarray(found.effects)[own].sum(0), effect, 1e-12)
        assert found.labels[own[-1]] == (Node(*writers[-1]), Node(*FINAL))
        change = np.asarray(written(m, clean, corrupt, mask, writers[-1]))[np.arange(2), last]
        # A small difference of two large targets: rounding is measured by these.
        error = np.abs(found.effects[own[-1]] - change @ np.asarray(direction)).max()
        assert error <= 1e-14 * np.abs(found.base).max()


def test_induction_is_known(x64, tokens):  # noqa: F811
    """G4: with the corrupt prompt one token behind, keys of layer 1 find the token after next."""
    m, position = induction_model(), N + 3
    corrupt = np.concatenate([tokens[:, :1], *[np.roll(tokens[:, 1 : N + 1], 1, 1)] * 2], 1)
    edges = {
        ((0, "head", 0), (1, "k", 0)): -1,
        ((0, "head", 0), (1, "q", 0)): 0,
        ((0, "head", 0), (1, "v", 0)): 0,
        ((0, "head", 0), FINAL): 0,
        ((1, "head", 0), FINAL): -1,
        (EMBED, (0, "v", 0)): -1,
        (EMBED, (0, "k", 0)): 0,
        (EMBED, (1, "q", 0)): -1,
        (EMBED, (1, "k", 0)): 0,
        (EMBED, (1, "v", 0)): -1,
    }
    target = Logit(tokens[:, position + 1], position=position)
    found = path_patching(m, tokens, corrupt, target, edges=list(edges))
    wanted = np.repeat(np.array(list(edges.values()))[:, None], 3, 1)
    np.testing.assert_allclose(found.effects, wanted, atol=1e-9)
    after = Logit(tokens[:, position + 2], position=position)
    found = path_patching(m, tokens, corrupt, after, edges=list(edges))
    np.testing.assert_allclose(found.effects[0], 1, atol=1e-9)


def test_one_program_for_lists_of_one_length():
    m = model("gpt2")
    clean, corrupt, mask, _ = pairs()
    first = path_patching(
        m, clean, corrupt, 3, edges=[(EMBED, FINAL), ((0, "mlp"), (2, "q", 1))], mask=mask
    )
    others = [((1, "head", 3), (2, "mlp")), ((0, "mlp"), (2, "q", 1))]
    with compilations() as names:
        second = path_patching(m, clean, corrupt, 3, edges=others, mask=mask)
    assert not any("path" in name for name in names), names
    assert (first.effects[1] == second.effects[1]).all()

    def effects(clean, corrupt, mask):
        return path_patching(m, clean, corrupt, 3, edges=others, mask=mask)

    found = jax.jit(effects)(clean, corrupt, mask)
    close(found.effects, second.effects, 1e-5)
    assert found.labels == second.labels
    assert [str(edge) for edge in found.labels] == ["L1 head 3 -> L2 mlp", "L0 mlp -> L2 q 1"]
    value, index = found.top(1)
    largest = np.abs(np.asarray(found.effects)).argmax(0)
    np.testing.assert_array_equal(index[0], largest)
    close(value[0], np.asarray(found.effects)[largest, [0, 1]], 1e-12)
    table = found.to_table(1)
    assert table["reader"] == [str(found.labels[i].reader) for i in largest]
    assert table["row"] == [0, 1] and found.to_table().n_rows == 4
    mean = found.mean(draws=10)
    assert mean.mean.shape == (2,) and (mean.low <= mean.high).all()
    assert "one reader" in found.meaning


@pytest.mark.parametrize(
    ("edges", "error", "match"),
    [
        ([((0, "mlp"), (0, "q", 1))], ValueError, "edges of the model, got L0 mlp -> L0 q 1"),
        ([((0, "head", 0), (0, "v", 0))], ValueError, "edges of the model"),
        ([((5, "mlp"), FINAL)], ValueError, "`writer` must be one of"),
        ([(EMBED, (0, "k", 5))], ValueError, "`reader` must be one of"),
        ([(EMBED, (0, "z", 0))], ValueError, "`reader` must be one of"),
        ([(EMBED,)], TypeError, "pairs of a writer and a reader"),
        ((EMBED, FINAL), TypeError, "pairs of a writer and a reader"),
        (3, TypeError, "pairs of a writer and a reader"),
        ([], ValueError, "at least one pair"),
    ],
)
def test_bad_edges_are_refused(edges, error, match):
    with pytest.raises(error, match=match):
        path_patching(model("llama"), [[1, 2]], [[1, 3]], 3, edges=edges)


def test_models_without_the_edges_are_refused():
    with pytest.raises(ValueError, match="stream is a sum of writes"):
        path_patching(model("stream_after"), [[1, 2]], [[1, 3]], 3, edges=[(EMBED, FINAL)])
    with pytest.raises(ValueError, match="edges of the model"):  # a parallel MLP reads no such head
        edges = [((0, "head", 0), (0, "mlp"))]
        path_patching(model("parallel"), [[1, 2]], [[1, 3]], 3, edges=edges)
