"""Integrated gradients against captum's, on Hugging Face's own forward."""

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients

from arrakis_jax import feature_attribution, from_pretrained
from tests.families import reference
from tests.models import chosen

TARGET, AGAINST = 5, 40


@pytest.mark.parametrize("case", chosen(["gpt2", "llama"], ["gpt2"]))
def test_integrated_gradients_are_captums(case, tmp_path):
    """The same nodes from the same baseline; learned positions stay, which GPT-2 adds itself."""
    torch_model = reference.torch_model(case)
    reference.save(torch_model, tmp_path)
    model = from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    tokens = rng.integers(61, size=(2, 8))
    with torch.no_grad():
        embeddings = torch_model.get_input_embeddings()(torch.tensor(tokens))
    baseline = torch.tensor(rng.normal(size=embeddings.shape) / 7, dtype=torch.float32)

    def difference(embeddings):
        last = torch_model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        return last[:, TARGET] - last[:, AGAINST]

    for steps in (7, 50):
        theirs, delta = IntegratedGradients(difference).attribute(
            embeddings, baseline, n_steps=steps, method="gausslegendre",
            return_convergence_delta=True,
        )  # fmt: skip
        found = feature_attribution(
            model, tokens, TARGET, against=AGAINST, method="integrated_gradients", steps=steps,
            baseline=baseline.numpy(),
        )  # fmt: skip
        want = theirs.sum(-1).detach().numpy()
        error = np.abs(np.asarray(found.tokens) - want).max() / np.abs(want).max()
        assert error <= 3e-5, f"{steps} steps: {error:.2g}"
        scale = np.abs(want).sum(-1).max()
        np.testing.assert_allclose(found.delta, delta.numpy(), atol=3e-5 * scale)
