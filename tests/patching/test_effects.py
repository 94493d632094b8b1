"""Effects as data, pairs of runs, and the graph of writers and readers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import run
from arrakis_jax.edges.graph import WRITTEN, Graph, Node, head_changes, writer_changes
from arrakis_jax.patching.effects import PatchEffects, axes_of, bootstrap, checked_over
from arrakis_jax.patching.pairs import checked_pair, checked_sites, values_at
from tests.models import close, config, model
from tests.patching.single import pairs, written


def effects(**changes) -> PatchEffects:
    rng = np.random.default_rng(0)
    found = {
        "z": jnp.asarray(rng.normal(size=(3, 2, 5, 4))),
        "k": jnp.asarray(rng.normal(size=(3, 1, 5, 4))),
    }
    about = dict(effects=found, over=("layer", "head", "position"), sites=("z", "k"))
    return PatchEffects(base=jnp.zeros(4), **about | changes)


def test_labels_name_the_cells_in_the_order_of_the_effects():
    found = effects()
    labels = found.labels
    assert len(labels) == 45 == len(found.terms) == len(list(labels))
    for i in (0, 7, 29, 30, 44):
        cell = labels[i]
        own = found.effects[cell.site][cell.layer, cell.head, cell.position]
        np.testing.assert_array_equal(found.terms[i], own)
    assert labels[-1] == labels[44] and labels[3:5] == (labels[3], labels[4])
    assert str(labels[44]) == "L2 k head 0 @ 4" and "45 cells" in repr(labels)
    with pytest.raises(IndexError, match=r"`i` must be in \[-45, 45\)"):
        labels[45]
    one = PatchEffects(effects=jnp.ones(2), base=jnp.zeros(2), over=(), sites=("final",))
    assert [str(cell) for cell in one.labels] == ["final"] and one.terms.shape == (1, 2)
    # Of several sites, each has the axes that it can have; and jit sorts the keys of a dict.
    mixed = effects(
        effects={"z": jnp.ones((3, 2, 4)), "final": jnp.zeros(4), "mlp_act": jnp.ones((3, 7, 4))},
        over=("layer", "head", "neuron"),
        sites=("z", "final", "mlp_act"),
    )
    names = [str(mixed.labels[i]) for i in (5, 6, 27)]
    assert names == ["L2 z head 1", "final", "L2 mlp_act neuron 6"]
    np.testing.assert_array_equal(jax.jit(lambda x: x)(mixed).terms, mixed.terms)
    assert axes_of("resid_pre", ("head", "position")) == ("position",)


def test_the_largest_and_tables():
    found = effects()
    top = found.top(3)
    order = np.argsort(-np.abs(found.terms), 0)[:3]
    np.testing.assert_array_equal(top.index, order)
    np.testing.assert_array_equal(top.value, np.take_along_axis(np.asarray(found.terms), order, 0))
    table = found.to_table(3)
    assert list(table) == ["cell", "site", "layer", "head", "position", "row", "effect"]
    assert table["cell"][:3] == [str(found.labels[i]) for i in order[:, 0]]
    assert table["row"] == np.repeat(range(4), 3).tolist()
    close(table["effect"], np.asarray(top.value).T.reshape(-1), 1e-12)
    assert found.to_table().n_rows == 45 * 4
    with pytest.raises(ValueError, match="`k` must be an int"):
        found.top(46)


def test_what_effects_mean():
    assert "source run's activation" in effects().meaning
    assert "with zero in place" in effects(patch="zero").meaning
    assert effects(patch="mean", method="atp").meaning.endswith("estimated by atp")


def test_bootstrap_intervals_cover(x64):
    """Of means of 40 normal numbers, about nine in ten; and a known mean."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(400, 40)) + 2)
    found = bootstrap(values, interval=0.9)
    close(found.mean, np.mean(values, -1), 1e-12)
    covered = np.mean((found.low <= 2) & (2 <= found.high))
    assert 0.84 < covered < 0.93, covered
    width = np.mean(found.high - found.low)
    assert abs(width / (2 * 1.645 / np.sqrt(40)) - 1) < 0.05
    wider = bootstrap(values, interval=0.99)
    assert (wider.low < found.low).all() and (wider.high > found.high).all()
    same = bootstrap(jnp.full((2, 5), 3.0))
    np.testing.assert_allclose(jnp.stack(same), 3, atol=1e-12)
    by_site = effects().mean(draws=20)
    assert by_site.low["z"].shape == (3, 2, 5)
    again = effects().mean(draws=20)
    np.testing.assert_array_equal(by_site.high["k"], again.high["k"])
    for change, match in ((dict(interval=1.0), "`interval`"), (dict(draws=0), "`draws`")):
        with pytest.raises(ValueError, match=match):
            bootstrap(values, **change)


def test_axes_and_sites_are_checked():
    assert checked_over("layer", ("z",)) == ("layer",)
    assert checked_over(["head", "layer"], ("z", "mlp_out")) == ("head", "layer")
    with pytest.raises(ValueError, match="axes of site 'final', got 'layer'"):
        checked_over(("layer",), ("final",))
    with pytest.raises(ValueError, match="axes of one of .*, got 'neuron'"):
        checked_over(("neuron",), ("z", "mlp_out"))
    assert checked_sites(config("llama"), ["z", "q"]) == ("z", "q")
    with pytest.raises(ValueError, match="at least one"):
        checked_sites(config("llama"), ())


def test_pairs_are_checked():
    m = model("llama")
    clean, corrupt = [[1, 2, 3]], [[1, 4, 3]]
    pair = checked_pair(m, clean, corrupt, None, base="corrupt")
    np.testing.assert_array_equal(pair.base, corrupt)
    np.testing.assert_array_equal(pair.source, clean)
    assert checked_pair(m, clean, None, [[1, 1, 0]], patch="zero").source is None
    for change in (dict(patch="mean"), dict(patch="zero", base="corrupt")):
        with pytest.raises(TypeError, match="`corrupt` must be token ids"):
            checked_pair(m, clean, None, None, **change)
    with pytest.raises(ValueError, match="`corrupt` must be in"):
        checked_pair(m, clean, [[1, 99, 3]], None)


def test_means_are_over_real_tokens(x64):
    m = model("gpt2", dtype="float64")
    _, corrupt, mask, _ = pairs()
    sites = ("final", "z", "resid_post")
    stream = run(m, corrupt, mask=mask, capture=("resid_pre", "final", "z")).residuals
    found = values_at(stream, sites, "mean")
    for site, value in found.items():
        rows = np.asarray(getattr(stream, site))
        rows = rows[mask] if site == "final" else rows[:, mask]
        mean = rows.mean(0 if site == "final" else 1)
        assert value.shape == getattr(stream, site).shape
        close(value[0, 0] if site == "final" else value[:, 1, 2], mean, 1e-12)


@pytest.mark.parametrize("variant", ["llama", "parallel", "attention_only"])
def test_the_graph_has_an_edge_from_every_writer_to_every_later_reader(variant):
    graph = Graph.of(config(variant))
    assert (len(graph.writers), len(graph.readers)) == (graph.n_writers, graph.n_readers)

    def step(node):
        """When a node of the model writes or reads: attention, then the MLP."""
        if node.layer is None:
            return -1 if node.kind == "embed" else 99
        late = node.kind == "mlp" and variant != "parallel"
        return 2 * node.layer + late

    for r, reader in enumerate(graph.readers):
        for w, writer in enumerate(graph.writers):
            assert graph.edges[r, w] == (step(writer) < step(reader)), (reader, writer)
    assert graph.index((2, "v", 1), "readers") == graph.readers.index(Node(2, "v", 1))
    assert graph.index((None, "embed"), "writers") == 0
    with pytest.raises(ValueError, match="`writer` must be one of the model's writers, got L2 q 1"):
        graph.index((2, "q", 1), "writers")
    with pytest.raises(ValueError, match="stream is a sum of writes, got norm_placement"):
        Graph.of(config("stream_rms"))


def test_what_writers_change(x64):
    """Through the norm of the output: each by a run with its output replaced; to first order."""
    m = model("post_layernorm", dtype="float64")
    clean, corrupt, mask, _ = pairs()
    graph = Graph.of(m.config)
    base, source = (run(m, t, mask=mask, capture=WRITTEN).residuals for t in (clean, corrupt))
    exact = writer_changes(m, base, source, linear=False)
    assert exact.shape == (graph.n_writers, *mask.shape, 20)
    assert np.abs(exact[:, ~mask]).max() < 1e-14
    for w in (0, 2, graph.n_heads + 1, graph.n_writers - 4):
        layer, kind, head = graph.writers[w]
        node = (layer, kind) if head is None else (layer, kind, head)
        close(exact[w], written(m, clean, corrupt, mask, node), 1e-10)
    near = replace(
        base, **{name: getattr(base, name) + 1e-6 * (getattr(source, name) - getattr(base, name))
                 for name in WRITTEN}
    )  # fmt: skip
    slope = writer_changes(m, base, near, linear=False) / 1e-6
    linear = writer_changes(m, base, source, linear=True)
    close(linear, slope, 1e-4)
    assert np.abs(linear - exact).max() > 0.1 * np.abs(exact).max()
    block = jax.tree.map(lambda w: w[1], m.blocks)
    heads = head_changes(block, base.z[1], source.z[1], linear=False)
    rows = [graph.index((1, "head", h), "writers") for h in range(6)]
    close(heads, exact[np.array(rows)], 1e-12)


def test_means_are_over_the_examples_that_have_a_token_there():
    mask = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1] * 5, [0, 0, 1, 1, 1]], bool)
    found = {k: np.array(x) for k, x in effects().effects.items()}
    there = {k: np.broadcast_to(mask.T, x.shape) for k, x in found.items()}
    zeroed = {k: jnp.asarray(np.where(there[k], x, 0)) for k, x in found.items()}
    means = effects(effects=zeroed, mask=jnp.asarray(mask)).mean(draws=300)
    for site, x in found.items():
        absent = np.where(there[site], x, np.nan)
        close(means.mean[site], np.nanmean(absent, -1), 1e-6)
        # One example alone: its interval is its own value. Without padding: as of plain values.
        for end in (means.low, means.high):
            close(end[site][..., 0], x[..., 0, 2], 1e-6)
        plain = bootstrap(jnp.asarray(x[..., 2:, :]), draws=300)
        for end, want in zip(means[1:], plain[1:], strict=True):
            close(end[site][..., 2:], want, 1e-6)
    nowhere = effects(effects=zeroed, mask=jnp.zeros_like(mask)).mean(draws=10)
    assert np.isnan(nowhere.mean["z"]).all() and np.isnan(nowhere.low["z"]).all()
