"""The benchmarks: what they count, how figures are told, and that wrong results have no speed."""

import ast
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arrakis_jax import Transformer, config_for, save
from benchmarks.against_peers import Side, difference, of_job, plain
from benchmarks.options import ROOT, Options
from benchmarks.ours import JOBS
from benchmarks.workloads import WORKLOADS, following, tokens
from tests.cost import flops, temporary


def run_benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_products_are_counted_in_loops_and_calls():
    def program(x, w):
        def step(x, _):
            return jax.checkpoint(lambda x: x @ w)(x), None

        return jax.lax.scan(step, jax.jit(jnp.dot)(x, w), None, length=5)[0]

    x, w = jnp.zeros((3, 4)), jnp.zeros((4, 4))
    assert flops(program, x, w) == 6 * 2 * 3 * 4 * 4
    assert temporary(lambda x: jnp.sin(x @ w) @ w, x) > 0


def test_figures_are_json_lines_and_a_table(tmp_path):
    found = run_benchmarks("compile_time", "--quick", "--repeats", "1", "--out", tmp_path / "f")
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if line.startswith("{")]
    assert lines == (tmp_path / "f").read_text().splitlines()
    first, *figures = map(json.loads, lines)
    assert first["benchmark"] == "measured_on" and first["device"] == "cpu"
    assert "processor" in first
    assert set(first["versions"]) >= {"jax", "flax", "arrakis_jax"}
    assert {figure["benchmark"] for figure in figures} == {"compile_time"}
    assert all(figure["ratio"] > 0 for figure in figures)
    assert found.stdout.splitlines()[-1].startswith("└")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile_tme",), "no benchmark"),
        (("limit", "--device", "npu"), "must be one of"),
        (("limit", "--model", "gpt5"), "no model"),
        (("limit", "--job", "forwards"), "no job"),
        (("against_peers", "--peers", "nowhere"), "setup.sh"),
    ],
)
def test_bad_input(arguments, message):
    found = run_benchmarks(*arguments)
    assert found.returncode != 0
    assert message in " ".join((found.stderr + found.stdout).split())


def test_a_side_does_jobs_and_tells_their_memory(tmp_path):
    workload = WORKLOADS["tiny"]
    model = Transformer(config_for(workload.family, **workload.shape), rngs=nnx.Rngs(0))
    save(model, tmp_path / "model")
    about = {"workload": "tiny", "checkpoint": str(tmp_path / "model"), "device": "cpu"}
    about |= {"dtype": "float32", "precision": "highest", "threads": 2}
    with Side(sys.executable, "benchmarks.ours", **about) as side:
        assert side.loaded["jobs"] == list(JOBS)
        side.process.kill()
        assert "(-9)" in side._answer("time", job="forward")["error"]
        found = side.ask("first", job="forward", save=str(tmp_path / "found.npz"))
        assert found["seconds"] > side.ask("time", job="forward")["seconds"] > 0
        assert side.growth("forward") >= 0
        assert "KeyError" in side.ask("time", job="no such job")["error"]
    ids = tokens(workload.batch, 97, 0)
    with np.load(tmp_path / "found.npz") as arrays:
        np.testing.assert_allclose(arrays["logits"], model(ids).logits[:, -1], atol=1e-5)


class Fake:
    """A side that tells a number and takes a time."""

    def __init__(self, value, seconds):
        self.value, self.seconds = value, seconds

    def ask(self, do, save=None, **_):
        if do == "first":
            np.savez(save, x=np.array([1.0, self.value]))
        return {"seconds": self.seconds, "peer": "a function"}

    def growth(self, job):
        return 10**6


def test_a_wrong_result_has_no_speed(tmp_path):
    def figure(value):
        sides = {"float32": Fake(value, 2.0)}
        (found,) = of_job("job", Fake(4.0, 6.0), sides, tmp_path, Options(repeats=1))
        return found

    right = figure(4.0002)
    assert right["times_as_fast"] == 3 and right["difference"] == pytest.approx(5e-5)
    wrong = figure(4.001)
    assert "times_as_fast" not in wrong and "differ by more than 0.0001" in wrong["error"]


def test_bfloat16_weights_are_compared_with_float32(tmp_path):
    """Ours may be as far from it as the peer's, which rounds all of its activations."""

    def figure(value):
        exact = tmp_path / "exact.npz"
        sides, peer = {"bfloat16 operands": Fake(value, 2.0)}, Fake(4.4, 6.0)
        Fake(4.0, 1.0).ask("first", save=exact)
        (found,) = of_job("job", peer, sides, tmp_path, Options(repeats=1), exact)
        assert found["peer_difference"] == pytest.approx(0.1)
        return found

    right = figure(4.2)
    assert right["times_as_fast"] == 3 and right["difference"] == pytest.approx(0.05)
    assert "differ by more than 0.1" in figure(4.5)["error"]


def test_arrays_of_other_shapes_differ_and_other_names_are_refused(tmp_path):
    for name, arrays in (("a", dict(x=np.ones(2))), ("b", dict(x=np.ones(3))), ("c", dict(y=1))):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    assert difference(tmp_path / "a.npz", tmp_path / "b.npz") == np.inf
    with pytest.raises(SystemExit, match="tell different things"):
        difference(tmp_path / "a.npz", tmp_path / "c.npz")


def test_both_sides_have_the_same_jobs():
    tree = ast.parse((ROOT / "benchmarks" / "peers" / "worker.py").read_text())
    names = [
        ast.literal_eval(call.args[0])
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "job"
    ]
    assert {plain(name) for name in names} == set(JOBS) and len(names) == len(set(names))


def test_both_sides_have_the_same_tokens():
    ids = tokens((2, 5), 97, 0)
    np.testing.assert_array_equal(ids, tokens((2, 5), 97, 0))
    assert (ids != tokens((2, 5), 97, 1)).any() and ids.max() < 97
    np.testing.assert_array_equal(following(ids)[:, :-1], ids[:, 1:])
