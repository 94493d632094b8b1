"""Every family against Hugging Face's own forward, through a checkpoint on disk."""

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from arrakis_jax.attribution.residual_gradients import residual_gradients
from arrakis_jax.checkpoint import from_pretrained
from arrakis_jax.forward.run import run
from tests.families import reference
from tests.families.cases import CASES, FEATURES, FIRST, OLD
from tests.models import chosen


def close(ours, theirs: np.ndarray, mask: np.ndarray, tolerance: float, what: str) -> None:
    """Asserts max|ours - theirs| <= tolerance * max|theirs| at real tokens, in every layer."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, what
    ours, theirs = ours[..., mask, :], theirs[..., mask, :]
    error = np.abs(ours - theirs).max((-2, -1)) / np.abs(theirs).max((-2, -1))
    assert error.max() <= tolerance, f"{what}: {error}"


def compare(model, torch_model, case: str, tolerance: float, gradient: float | None = None) -> None:
    tokens, mask = reference.batch(case)
    want = reference.forward(torch_model, tokens, mask)
    out = run(model, tokens, mask=mask)
    close(out.residuals.embed, want["embed"], mask, tolerance, "embed")
    close(out.residuals.resid_post, want["resid_post"], mask, tolerance, "resid_post")
    close(out.logits, want["logits"], mask, tolerance, "logits")
    if gradient is not None:
        a = np.arange(len(tokens)) + 3
        b = a + 20
        found = residual_gradients(model, tokens, a, against=b, mask=mask).embed
        theirs = reference.gradient(torch_model, tokens, mask, a, b)
        close(found, theirs, mask, gradient, "gradient")


@pytest.mark.parametrize("case", FIRST.values())
def test_float32(case, tmp_path):
    torch_model = reference.torch_model(case)
    reference.save(torch_model, tmp_path)
    compare(from_pretrained(tmp_path), torch_model, case, 2e-5, gradient=1e-4)


@pytest.mark.parametrize("case", chosen(CASES, FEATURES))
def test_float64(case, tmp_path):
    with jax.enable_x64(True), reference.true_float64():
        torch_model = reference.torch_model(case, torch.float64)
        reference.save(torch_model, tmp_path)
        model = from_pretrained(tmp_path)
        assert model.config.dtype == "float64"
        compare(model, torch_model, case, 1e-9)


@pytest.mark.parametrize("case", OLD)
def test_old_config_and_bfloat16_in_two_files(case, tmp_path):
    """Against float32 with the rounded weights: as ever, and in bfloat16 within 1e-2."""
    torch_model = reference.rounded(reference.torch_model(case), torch.bfloat16)
    reference.save(torch_model, tmp_path, dtype=torch.bfloat16, shards=True, old_json=True)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2
    compare(from_pretrained(tmp_path, dtype="float32"), torch_model, case, 2e-5)
    model = from_pretrained(tmp_path)
    assert model.config.dtype == "bfloat16"
    compare(model, torch_model, case, 1e-2)


@pytest.mark.parametrize("case", [case for case in OLD if CASES[case][0] != "falcon"])
def test_old_configs_are_read_by_hugging_face(case, tmp_path):
    """Falcon's first name, RefinedWeb, was code beside the weights."""
    torch_model = reference.torch_model(case)
    reference.save(torch_model, tmp_path, old_json=True)
    own, again = torch_model.config.to_dict(), AutoConfig.from_pretrained(tmp_path).to_dict()
    (again.get("rope_parameters") or {}).pop("type", None)
    again["_name_or_path"] = own["_name_or_path"]
    assert {name: again[name] for name in own} == own
