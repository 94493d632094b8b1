"""The shipped model: its figures recomputed from its weights, its text, and its size."""

import json

import jax
import numpy as np
import pytest

from arrakis_jax import encode, run, token_id
from arrakis_jax.demo import FOLDER, text
from arrakis_jax.demo.evaluate import figures
from arrakis_jax.demo.train import build_tokenizer
from arrakis_jax.text import tokenizer_for
from tests.models import SENTENCE


def test_the_written_figures_are_those_of_the_weights(demo):
    written = json.loads((FOLDER / "figures.json").read_text())
    found = figures(*demo)
    assert min(found["indirect_object"][order] for order in ("ABBA", "BABA")) >= 0.99
    assert found["induction"]["score"] >= 0.9
    assert found["agreement"] >= 0.99
    assert found["indirect_object"] == pytest.approx(written["indirect_object"], abs=2e-3)
    assert found["agreement"] == pytest.approx(written["agreement"], abs=2e-3)
    assert found["induction"] == pytest.approx(written["induction"], abs=1e-4)
    assert written["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(demo[0]))
    assert written["training"]["seconds"] <= 1200


def test_the_sentence_of_the_readme(demo):
    model, tokenizer = demo
    tokens, mask = encode(tokenizer, [SENTENCE, SENTENCE.replace("John gave", "Mary gave")])
    guess = run(model, tokens, mask=mask).logits[:, -1].argmax(-1)
    assert tokenizer.decode(guess[:1]) == " Mary" and tokenizer.decode(guess[1:]) == " John"


def test_it_is_small(demo):
    assert sum(leaf.size for leaf in jax.tree.leaves(demo[0])) <= 1_200_000
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(demo[0]))
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 5e6


def test_transformers_loads_it_and_agrees(demo):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = demo
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").eval()
    tokens, _ = encode(tokenizer, SENTENCE)
    assert AutoTokenizer.from_pretrained(FOLDER)(SENTENCE).input_ids == tokens[0].tolist()
    with torch.no_grad():
        want = theirs(torch.as_tensor(tokens, dtype=torch.long)).logits.numpy()
    got = np.asarray(run(model, tokens).logits)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


def test_any_text_survives_the_tokenizer(demo):
    _, tokenizer = demo
    for written in (SENTENCE, "Zebras, wörter und 数字!"):
        ids = encode(tokenizer, written).tokens[0]
        assert ids[0] == tokenizer.bos_token_id and list(ids).count(ids[0]) == 1
        assert tokenizer.decode(ids[1:]) == f" {written}"


def test_every_word_is_one_token(demo, tmp_path):
    tokenizer = demo[1]
    for word in text.words():
        assert tokenizer.decode([token_id(tokenizer, f" {word}")]) == f" {word}"
    build_tokenizer(tmp_path)
    assert tokenizer_for(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_indirect_object_prompts(order):
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for _ in range(200):
            prompt = text.indirect_object(rng, order=order, held_out=held_out)
            words = prompt.text.replace(",", "").replace(".", "").split()
            answer, other = prompt.answer.strip(), prompt.other.strip()
            names = [word for word in words if word in text.NAMES]
            expected = [answer, other, other] if order == "ABBA" else [other, answer, other]
            assert names == expected and words[-1] == "to"
            assert text.is_held_out(*sorted((answer, other))) == held_out


def test_held_out_text_is_not_in_training():
    for parts in (text.OPENINGS, text.CLOSINGS):
        assert parts[True] and parts[False] and not set(parts[True]) & set(parts[False])
    rng = np.random.default_rng(0)
    source = text.sentences(rng)
    for _ in range(2000):
        sentence, rest = next(source)
        names = [w.strip(",.") for w in sentence.split() if w.strip(",.") in text.NAMES]
        if names:
            assert not text.is_held_out(*sorted({*names}))
            assert rest.strip(" .") in names


def test_the_text_is_seeded():
    def draw(seed):
        source = text.sentences(np.random.default_rng(seed))
        return [next(source) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_repeated_sequences_hold_no_token_twice():
    twice = text.repeated(np.random.default_rng(0), np.arange(5, 60), 25)
    assert (twice[:25] == twice[25:]).all() and len(set(twice[:25].tolist())) == 25
