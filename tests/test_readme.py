"""The README's example prints what the README says, and so do the examples of docstrings."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import arrakis_jax

README = Path(__file__).resolve().parents[1] / "README.md"
MODULES = [m.name for m in pkgutil.walk_packages(arrakis_jax.__path__, "arrakis_jax.")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_examples_print_what_the_readme_says():
    examples, outputs = blocks("python"), blocks("text")
    assert examples and len(examples) == len(outputs)
    names: dict = {}
    for example, output in zip(examples, outputs, strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(example, names)
        got, want = (
            re.split(r"([+-]?\d+\.\d+)", text.strip()) for text in (printed.getvalue(), output)
        )
        assert got[::2] == want[::2], printed.getvalue()
        assert [float(x) for x in got[1::2]] == pytest.approx(
            [float(x) for x in want[1::2]], abs=0.011
        )


def test_set_up_stands_in_the_first_thirty_lines():
    head = README.read_text().splitlines()[:30]
    assert [line for line in head if line.startswith("pip install")] == [
        "pip install . && arrakis-jax analyze",
        'pip install ".[test]" && pytest',
    ]


@pytest.mark.parametrize("module", [name for name in MODULES if not name.endswith(".train")])
def test_examples_of_docstrings(module):
    names = vars(arrakis_jax) | {"jax": jax, "jnp": jnp, "nnx": nnx}
    failed, _ = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert failed == 0


def test_it_lists_every_family():
    from arrakis_jax.families import families

    names = {family.name for family in families().values()}
    text = README.read_text()
    listed = text.split("### Families")[1].split("[VERIFIED.md]")[0]
    assert set(re.findall(r"\b[a-z][a-z0-9_]*\b", listed)) >= names
    assert f"checkpoints of {len(names)} decoder families" in text
