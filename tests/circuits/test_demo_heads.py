"""On the shipped model: heads named by a score are those without which a task fails.

Mean ablation puts the mean of z over a reference batch's real tokens in its place at every
position. Heads are named on one batch, and ablated on a fresh one. No head is named here.
"""

import numpy as np
import pytest

from arrakis_jax import Capture, Set, encode, logit_attribution, residual_gradients, run, token_id
from arrakis_jax.circuits.head_scores import head_scores, repeated_tokens
from arrakis_jax.demo import text
from tests.models import chosen

N, DRAWS = 25, 20


def above(score_LH, least):
    """The heads of at least this score, `(layer, head)` each."""
    return [tuple(pair) for pair in np.argwhere(np.asarray(score_LH) >= least).tolist()]


def random_draws(named, excluded, seed=0):
    """As many other heads as are named, 20 times."""
    others = [(i, h) for i in range(4) for h in range(4) if (i, h) not in excluded]
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield [others[i] for i in rng.choice(len(others), len(named), replace=False)]


def means(model, tokens, mask):
    """`[L,H,K]`, the mean of z over real tokens."""
    z_LBTHK = run(model, tokens, mask=mask, capture=("z",)).residuals.z
    return z_LBTHK.sum((1, 2)) / mask.sum()


def ablation(mean_LHK, heads):
    return tuple(Set("z", mean_LHK[i, h], layer=i, head=h) for i, h in heads)


@pytest.fixture(scope="module")
def repeated(demo):
    """Scores on one batch of repeated tokens, and the accuracy with edits on another."""
    model, tokenizer = demo
    tokens, fresh = (
        repeated_tokens(seed, model.config.vocab_size, n=N, batch=32, bos=tokenizer.bos_token_id)
        for seed in (0, 1)
    )
    scores = head_scores(model, tokens)
    mean_LHK = means(model, tokens, np.ones(tokens.shape, bool))
    queries = np.arange(N + 1, 2 * N)  # those in the second copy whose next token is in it

    def accuracy(heads):
        logits = run(model, fresh, edits=ablation(mean_LHK, heads), capture=("logits",)).logits
        guess = np.asarray(logits[:, queries].argmax(-1))
        return (guess == fresh[:, queries + 1]).mean()

    named = {kind: above(getattr(scores, kind).mean(-1), 0.5) for kind in ("induction", "previous")}
    return named, accuracy


def test_the_induction_heads(repeated):
    """Chance is one of the N tokens. Controls are drawn from heads that neither score names:
    previous-token heads are the other half of the same circuit (see the next test).
    """
    named, accuracy = repeated
    assert 1 <= len(named["induction"]) <= 4
    clean = accuracy([])
    assert clean > 0.98
    assert accuracy(named["induction"]) <= 1 / N
    controls = random_draws(named["induction"], named["induction"] + named["previous"])
    assert np.mean([accuracy(heads) for heads in controls]) >= 0.8 * clean


def test_the_previous_token_heads_that_they_need(repeated):
    named, accuracy = repeated
    assert 1 <= len(named["previous"]) <= 4
    assert max(i for i, _ in named["previous"]) < min(i for i, _ in named["induction"])
    assert accuracy(named["previous"]) <= 2 / N
    controls = random_draws(named["previous"], named["previous"])
    assert np.mean([accuracy(heads) for heads in controls]) >= 0.8 * accuracy([])


def names(tokenizer, seed, n=128):
    """Indirect-object prompts, of either order in turn: tokens, mask, and both names."""
    rng = np.random.default_rng(seed)
    orders = ("ABBA", "BABA") * (n // 2)
    prompts = [text.indirect_object(rng, order=order, held_out=True) for order in orders]
    both = [[token_id(tokenizer, x) for x in (p.answer, p.other)] for p in prompts]
    return *encode(tokenizer, [p.text for p in prompts]), *np.array(both).T


@pytest.mark.parametrize("seed", chosen([0, 2, 4], [0]))
def test_the_heads_of_the_indirect_object_task(demo, seed):
    """Named by the first-order effect of their mean ablation: at least a third of the largest."""
    model, tokenizer = demo
    tokens, mask, answer, other = names(tokenizer, seed)
    z = run(model, tokens, mask=mask, capture=("z",)).residuals.z
    mean_LHK = means(model, tokens, mask)
    slope = residual_gradients(model, tokens, answer, against=other, mask=mask, capture=("z",)).z
    loss_LH = ((z - mean_LHK[:, None, None]) * slope).sum((2, 4)).mean(1)
    named = above(loss_LH, loss_LH.max() / 3)
    assert 1 <= len(named) <= 4

    tokens, mask, answer, other = names(tokenizer, seed + 1)
    fields = Capture(("logits",), positions=(-1,))

    def difference(heads):
        edits = ablation(mean_LHK, heads)
        logits = np.asarray(run(model, tokens, mask=mask, edits=edits, capture=fields).logits)[:, 0]
        rows = np.arange(len(answer))
        return (logits[rows, answer] - logits[rows, other]).mean()

    clean = difference([])
    assert clean > 10
    assert difference(named) <= 0.2 * clean
    controls = [difference(heads) for heads in random_draws(named, named)]
    assert np.mean(controls) >= 0.8 * clean


def test_direct_attribution_does_not_find_them(demo):
    """What the direct effect names is made up for by what comes after: not the heads needed."""
    model, tokenizer = demo
    tokens, mask, answer, other = names(tokenizer, 0)
    found = logit_attribution(model, tokens, answer, against=other, by="head", mask=mask)
    direct_LH = found.by_head().mean(-1)
    named = above(direct_LH, direct_LH.max() / 2)
    edits = ablation(means(model, tokens, mask), named)
    out = run(model, tokens, mask=mask, edits=edits)
    left = logit_attribution(model, out, answer, against=other).logit.mean()
    assert left > 0.5 * found.logit.mean()
