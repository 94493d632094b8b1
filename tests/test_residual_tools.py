"""The facade: text, ids and streams give what the functions give, compiled once."""

import jax
import numpy as np
import pytest

from arrakis_jax import (
    ResidualTools,
    encode,
    feature_attribution,
    residual_decomposition,
    residual_movement,
    run,
    token_id,
)
from tests.models import compilations

TEXTS = ["When Mary and John went to the store, John gave a drink to", "The key near the boxes"]


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_text_ids_and_stream_agree(demo):
    model, tokenizer = demo
    tools = ResidualTools(model, tokenizer)
    tokens, mask = encode(tokenizer, TEXTS)
    stream = run(model, tokens, mask=mask).residuals

    want = residual_decomposition(stream, -1)
    for given in (TEXTS, stream):
        same(tools.residual_decomposition(given, -1), want)
    same(tools.residual_decomposition(tokens, -1, mask=mask), want)

    want = residual_movement(model, tokens, 0, -1, mask=mask)
    same(tools.residual_movement(TEXTS, 0, -1), want)
    same(tools.residual_movement(tokens, 0, -1, mask=mask), want)
    same(tools.residual_movement(stream, 0, -1), want)

    ids = [token_id(tokenizer, " Mary"), token_id(tokenizer, " is")]
    want = feature_attribution(model, tokens, ids, against=3, mask=mask)
    same(tools.feature_attribution(TEXTS, [" Mary", " is"], against=3), want)
    same(tools.feature_attribution(tokens, ids, against=3, mask=mask), want)
    one = feature_attribution(model, tokens[:1], ids[0], against=3, mask=mask[:1])
    same(tools.feature_attribution(TEXTS[0], " Mary", against=3), one)


def test_a_second_instance_compiles_nothing(demo):
    def use():
        tools = ResidualTools(*demo)
        tools.residual_decomposition(TEXTS, 1)
        tools.residual_movement(TEXTS, 0, 2)
        tools.feature_attribution(TEXTS, " Mary", against=" John", method="saliency")

    use()
    with compilations() as compiled:
        use()
    assert compiled == []


def test_bad_input(demo):
    model, tokenizer = demo
    mute = ResidualTools(model)
    with pytest.raises(TypeError, match="must be token ids without a tokenizer, got text"):
        mute.residual_movement("Mary", 0, 1)
    with pytest.raises(TypeError, match="`target_ids` must be ids without a tokenizer, got text"):
        mute.feature_attribution(np.array([[1, 2]]), " Mary")
    tools = ResidualTools(model, tokenizer)
    with pytest.raises(TypeError, match="`mask` must be left out with text, got"):
        tools.residual_movement("Mary", 0, 1, mask=np.ones((1, 2), bool))
    with pytest.raises(IndexError, match=r"`layer_idx2` must be in \[-4, 4\), got 4"):
        tools.residual_movement("Mary", 0, 4)
    stream = run(model, np.array([[1, 2]])).residuals
    with pytest.raises(TypeError, match="`options` must be none with a stream, got"):
        tools.residual_decomposition(stream, 0, check=True)
    with pytest.raises(ValueError, match="`mask` must be the stream's own, or None, got another"):
        tools.residual_decomposition(stream, 0, mask=np.array([[0, 1]]))
