"""The largest terms, found as the layers run; and results as tables."""

import jax
import numpy as np
import pytest

from arrakis_jax import Scale, decompose, logit_attribution, run, top_attribution
from tests.models import batch, chosen, close, compilations, model


@pytest.mark.parametrize("by", ["component", "neuron", "source"])
@pytest.mark.parametrize(
    "variant",
    chosen(["gpt2", "both", "attention_only", "stream_after", "mixed", "mixed_more", "moe"],
           ["both", "stream_after", "mixed"]),
)  # fmt: skip
def test_they_are_those_of_the_whole(variant, by, x64):
    m = model(variant, dtype="float64")
    tokens, mask, _ = batch()
    k = 3 if by == "component" or variant == "attention_only" else 9
    for position in (-1, None):
        about = dict(against=4, by=by, position=position, mask=mask)
        every = logit_attribution(m, tokens, 7, **about)
        found = top_attribution(m, tokens, 7, k, **about)
        close(found.terms, every.top(k).value, 1e-10)
        chosen = np.take_along_axis(np.asarray(every.terms), np.asarray(found.index), 0)
        close(found.terms, chosen, 1e-10)
        close(found.logit, every.logit, 1e-12)
        assert found.gap.max() < 1e-12
        close(found.rest, found.logit - found.constant - found.terms.sum(0), 1e-12)
        assert found.labels == every.labels
    some = top_attribution(m, tokens, 7, 2, by="component", kinds=("embed", "attn"), mask=mask)
    assert np.isnan(some.gap).all()
    labels = {some.labels[int(i)].kind for i in some.index.ravel()}
    assert labels <= {"embed", "attn"}


def test_of_a_captured_stream_of_some_layers_and_in_jit():
    m = model("gpt2")
    tokens, mask, _ = batch()
    plain = top_attribution(m, tokens, 7, 4, mask=mask)
    out = run(m, tokens, mask=mask, capture="all")
    close(top_attribution(m, out, 7, 4).terms, plain.terms, 1e-5)
    some = top_attribution(m, tokens, 7, 4, layers=(1,), kinds=("neuron",), mask=mask)
    assert {some.labels[int(i)].layer for i in some.index.ravel()} == {1}
    jitted = jax.jit(lambda m, t, k: top_attribution(m, t, 7, 4, mask=k).terms)
    close(jitted(m, tokens, mask), plain.terms, 1e-5)
    with compilations() as names:
        top_attribution(m, tokens, 8, 4, position=0, mask=mask)
    assert names == []
    for call in (
        lambda: top_attribution(m, tokens, 7, 100, by="component", mask=mask),
        lambda: top_attribution(m, out, 7, 100, by="component"),
        lambda: top_attribution(m, tokens, 7, 0, mask=mask),
    ):
        with pytest.raises(ValueError, match=r"`k` must be an int in \[1, .* got"):
            call()


def test_an_edit_that_breaks_the_sum_is_reported(x64):
    m = model("gpt2", dtype="float64")
    edit = Scale("resid_mid", 0.5, layer=1)
    edited = run(m, np.arange(6)[None], capture="all", edits=edit)
    every = logit_attribution(m, edited, 7, by="neuron")
    found = top_attribution(m, edited, 7, 9)
    assert found.gap.max() > 1e-3
    close(found.gap, every.gap, 1e-10)
    close(found.rest, every.logit - every.constant - found.terms.sum(0), 1e-10)


def test_tables():
    m = model("gpt2")
    tokens, mask, _ = batch()
    found = logit_attribution(m, tokens, 7, by="head", mask=mask)
    table = found.to_table()
    assert table.n_rows == len(found.labels) * 5
    first = {name: column[2] for name, column in table.items()}
    assert first == {
        "term": "L0 head 0", "layer": 0, "kind": "head", "index": 0, "source": None, "row": 0,
        "value": float(found.terms[2, 0]),
    }  # fmt: skip
    assert table["value"] == np.asarray(found.terms).T.ravel().tolist()
    short = found.to_table(3)
    value, index = found.top(3)
    assert short["value"] == np.asarray(value).T.ravel().tolist()
    assert short["term"][0] == str(found.labels[int(index[0, 0])])
    assert "L2" in str(table) + str(short) and "more rows" in str(table)
    everywhere = logit_attribution(m, tokens, 7, mask=mask, position=None).to_table(2)
    assert everywhere["position"][2 * 3] == 3 and everywhere.n_rows == 2 * 5 * 11
    norms = decompose(m, tokens, mask=mask).to_table(1)
    assert set(norms) == {"term", "layer", "kind", "index", "source", "row", "position", "norm"}
    top = top_attribution(m, tokens, 7, 3, by="source", mask=mask).to_table()
    assert top.n_rows == 15 and "source" in top
    with pytest.raises(ValueError, match=r"`k` must be an int in \[1, 26\], got 27"):
        found.to_table(27)


@pytest.mark.parametrize("variant", ["llama", "stream_after"])
def test_a_model_without_layers_has_its_embedding_alone(variant):
    m = model(variant, n_layers=0)
    tokens = np.arange(5)[None]
    whole = logit_attribution(m, tokens, 3)
    assert {label.kind for label in whole.labels} <= {"embed", "pos"}
    assert whole.gap.max() < 1e-5
    for source in (tokens, run(m, tokens, capture="all")):
        close(top_attribution(m, source, 3, 1, by="component").terms, whole.top(1).value, 1e-6)
        close(logit_attribution(m, source, 3).terms, whole.terms, 1e-6)
