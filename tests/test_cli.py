"""The command line: what it prints and writes, and how it fails."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from arrakis_jax import encode, feature_attribution, residual_movement, token_id
from arrakis_jax.checkpoint import from_pretrained
from arrakis_jax.cli import app
from arrakis_jax.demo import FOLDER
from tests.models import SENTENCE, chosen


@pytest.fixture(autouse=True)
def _cache_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp()))


def call(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    file = tmp_path_factory.mktemp("cli") / "out.json"
    result = call("analyze", "--json", str(file))
    assert result.exit_code == 0, result.output
    return result.output, json.loads(file.read_text())


def test_what_analyze_prints(default):
    printed, _ = default
    assert f"{SENTENCE} → Mary" in printed
    assert "logit of ' Mary' less that of ' John'" in printed
    total, own = re.search(r"sum\W+([+-][\d.]+)\W+the model's own ([+-][\d.]+)", printed).groups()
    assert float(total) == pytest.approx(float(own), abs=2e-3)
    for title in ("What writes", "The ten heads", "How far the stream moves", "Which input tokens"):
        assert title in printed


def test_the_numbers_add_up(default):
    _, found = default
    difference = found["logit_difference"]
    assert difference > 1
    components = sum(term["value"] for term in found["components"]) + found["constant"]
    assert components == pytest.approx(difference, rel=1e-5) and found["gap"] < 1e-5
    for layer in range(4):
        heads = [t["value"] for t in found["heads"] if t["layer"] == layer]
        attn = [
            t["value"] for t in found["components"] if (t["layer"], t["kind"]) == (layer, "attn")
        ]
        assert sum(heads) == pytest.approx(attn[0], abs=1e-4)
    assert [row["layer"] for row in found["movement"]] == [0, 1, 2, 3]
    tokens = [row["token"] for row in found["tokens"]]
    assert tokens[0] == "<bos>" and "".join(tokens[1:]) == f" {SENTENCE}"
    assert np.isfinite([row["value"] for row in found["tokens"]]).all()


def test_the_numbers_are_those_of_the_functions(default, demo):
    _, found = default
    model, tokenizer = demo
    tokens, mask = encode(tokenizer, SENTENCE)
    mary, john = (token_id(tokenizer, name) for name in (" Mary", " John"))
    for layer in (1, 2, 3):
        moved = residual_movement(model, tokens, layer - 1, layer, mask=mask)
        for name in ("relative_norm", "cosine", "angle"):
            own = float(getattr(moved, name)[0, -1])
            assert found["movement"][layer][name] == pytest.approx(own, rel=1e-4)
    want = feature_attribution(
        model, tokens, mary, against=john, mask=mask, method="integrated_gradients"
    ).tokens[0]
    np.testing.assert_allclose([row["value"] for row in found["tokens"]], want, atol=1e-4)


def test_swapping_the_names_swaps_the_prediction(tmp_path):
    file = tmp_path / "out.json"
    swapped = "When Mary and John went to the store, Mary gave a drink to"
    assert call("analyze", swapped, "--json", str(file)).exit_code == 0
    found = json.loads(file.read_text())
    assert (found["prediction"], found["target"]) == (" John", " John")


def test_target_and_against(tmp_path):
    file = tmp_path / "out.json"
    result = call(
        "analyze", SENTENCE, "--model", str(FOLDER), "--target", " John", "--against", " Mary",
        "--json", str(file),
    )  # fmt: skip
    assert result.exit_code == 0
    found = json.loads(file.read_text())
    assert found["logit_difference"] < 0 and found["prediction"] == " Mary"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze", ""], "`text` must be a text of at least one token, got ''"),
        (["analyze", "--target", " Mary John"], "must be exactly one token, got ' Mary John'"),
        (["analyze", "--target", " Mary", "--against", " Mary"], "`--against` must be another"),
        (["analyze", "--model", "no/such/model"], "`path_or_repo_id` must be a folder"),
        (["analyze", "--json", "/no/such/folder/out.json"], "`--json` must be a file in an"),
        (["info", "no/such/model"], "`path_or_repo_id` must be a folder, or a hub id"),
        (["convert", "no/such/model", "no/such/out"], "`path_or_repo_id` must be a folder, or a"),
        (["convert", str(FOLDER), str(FOLDER)], "`out` must be a new or empty folder, got"),
        (["convert", str(FOLDER), "no/such/out", "--dtype", "int8"], "`dtype` must be 'float32'"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message):
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert not Path("no/such/out").exists()


def test_unknown_options_and_commands_are_usage_errors():
    assert call("analyze", "--colour").exit_code == 2
    assert call("dissect").exit_code == 2


def test_info():
    result = call("info", str(FOLDER))
    assert result.exit_code == 0
    for word in ("parameters", "n_layers", "d_model", "rmsnorm", "rope"):
        assert word in result.output


@pytest.mark.parametrize(
    ("options", "dtype"),
    chosen([([], "float32"), (["--dtype", "bfloat16"], "bfloat16")], [([], "float32")]),
)
def test_convert(tmp_path, demo, options, dtype):
    result = call("convert", str(FOLDER), str(tmp_path / "out"), *options)
    assert result.exit_code == 0, result.output
    model = from_pretrained(tmp_path / "out")
    assert model.config.dtype == dtype
    np.testing.assert_array_equal(model.w_e[...], demo[0].w_e[...].astype(dtype))
    leaves = jax.tree.leaves(model)
    for number in (sum(leaf.size for leaf in leaves), sum(leaf.nbytes for leaf in leaves)):
        assert f"{number:,}" in result.output
    assert dtype in result.output and "out" in result.output
    assert "tokenizer.json" in result.output
    assert call("analyze", SENTENCE, "--model", str(tmp_path / "out")).exit_code == 0
    again = call("convert", str(FOLDER), str(tmp_path / "out"))
    assert again.exit_code == 2 and "`out` must be a new or empty folder, got" in again.stderr
