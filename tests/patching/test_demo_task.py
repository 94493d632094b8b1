"""On the shipped model's indirect-object task: estimates of patching against exact patching.

The clean prompt repeats one name, the corrupted one the other. No head is named here.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from arrakis_jax import (
    Logit,
    agreement,
    attribution_patching,
    circuit_faithfulness,
    edge_attribution,
    encode,
    feature_attribution,
    patch_sweep,
    token_faithfulness,
    token_id,
)
from arrakis_jax.demo import text

NOISE = 0.1  # of effects that reach 18 logits; those of heads without a part stay below 0.02


@pytest.fixture(scope="module")
def task(demo):
    """The model, 200 prompts in both versions, their target and mask."""
    model, tokenizer = demo
    rng = np.random.default_rng(5)
    orders = ("BABA", "ABBA") * 100
    prompts = [text.indirect_object(rng, order=order, held_out=True) for order in orders]
    clean, mask = encode(tokenizer, [p.text for p in prompts])
    swapped = [p.answer.join(p.text.rsplit(p.other, 1)) for p in prompts]
    corrupt, _ = encode(tokenizer, swapped)
    right, wrong = np.array(
        [[token_id(tokenizer, name) for name in (p.answer, p.other)] for p in prompts]
    ).T
    return model, clean, corrupt, mask, right, wrong


def first(task, n):
    model, clean, corrupt, mask, right, wrong = task
    return (model, clean[:n], corrupt[:n], Logit(right[:n], wrong[:n])), mask[:n]


@pytest.mark.exhaustive
def test_atp_star_ranks_heads_as_exact_patching_does(task):
    """Every query, key and value node of every head; plain AtP does worse."""
    pair, mask = first(task, 64)
    options = dict(sites=("q", "k", "v"), over=("layer", "head"), mask=mask)
    exact = patch_sweep(*pair, **options)
    assert exact.base.mean() > 15 and exact.source.mean() < -15

    def near(method):
        found = attribution_patching(*pair, method=method, **options)
        means = (x.terms.mean(-1)[:, None] for x in (found, exact))
        return agreement(*means, least=NOISE)

    star, plain = near("atp_star"), near("atp")
    assert star.n[0] >= 20
    assert star.rank_correlation[0] >= 0.9 > plain.rank_correlation[0]
    assert star.sign_agreement[0] >= 0.95


def test_head_outputs_too(task):
    pair, mask = first(task, 64)
    options = dict(sites="z", over=("layer", "head"), mask=mask)
    exact = patch_sweep(*pair, **options).effects.mean(-1)
    found = attribution_patching(*pair, method="atp_star", **options).effects.mean(-1)
    near = agreement(found[..., None], exact[..., None], least=NOISE)
    assert near.n[0] >= 12
    assert near.rank_correlation[0] >= 0.9 and near.sign_agreement[0] >= 0.95


@pytest.mark.exhaustive
def test_taking_the_tokens_away_that_are_named_costs_more_than_random_ones(task):
    model, clean, _, mask, right, wrong = task
    goal = Logit(right, wrong)
    scores = feature_attribution(model, clean, goal, method="occlusion", mask=mask).tokens
    curves = token_faithfulness(model, clean, scores, goal, draws=2, mask=mask)
    less = np.asarray(curves.random.deletion_auc.mean(0) - curves.found.deletion_auc)
    drawn = np.random.default_rng(0).choice(less, (1000, 200)).mean(1)
    assert less.mean() >= 3 * drawn.std()
    more = np.asarray(curves.found.comprehensiveness - curves.random.comprehensiveness.mean(0))
    assert more.mean() >= 3 * np.random.default_rng(0).choice(more, (1000, 200)).mean(1).std()


def test_a_fifth_of_the_edges_do_the_task(task):
    pair, mask = first(task, 32)
    edges = edge_attribution(*pair, steps=5, mask=mask)
    scores = edges.effects.mean(-1)
    found = circuit_faithfulness(*pair, scores=scores, fractions=(0.2, 1.0), mask=mask)
    assert found.of_means[0] > 0.85 and abs(found.of_means[1] - 1) < 1e-3
    shuffled = np.zeros(scores.shape)
    there = edges.graph.edges
    shuffled[there] = np.random.default_rng(0).permutation(np.asarray(scores)[there])
    control = circuit_faithfulness(
        *pair, scores=jnp.asarray(shuffled), fractions=(0.2, 1.0), mask=mask
    )
    assert control.of_means[0] < 0.3
