"""The README's example and the programs of `examples/` print what they say.

So do the examples of docstrings. Links lead to files, and the README names every public function.
"""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import inspect
import io
import pkgutil
import re
import runpy
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import arrakis_jax
import arrakis_jax.examples

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = [m.name for m in pkgutil.iter_modules(arrakis_jax.examples.__path__)]
# Importing a program of `examples/` runs it, and training needs another package.
MODULES = [
    m.name
    for m in pkgutil.walk_packages(arrakis_jax.__path__, "arrakis_jax.")
    if not m.name.startswith("arrakis_jax.examples.") and not m.name.endswith(".train")
]


def assert_prints(program: Callable[[], object], promised: str) -> None:
    """What a program prints is what was promised; decimal fractions within 0.011."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        program()
    got, want = (
        re.split(r"([+-]?\d+\.\d+)", text.strip()) for text in (printed.getvalue(), promised)
    )
    assert got[::2] == want[::2], printed.getvalue()
    assert [float(x) for x in got[1::2]] == pytest.approx([float(x) for x in want[1::2]], abs=0.011)


def test_the_readme_prints_what_it_says():
    examples = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)
    assert examples and README.count("```text") == sum(bool(output) for _, output in examples)
    names: dict = {}
    for example, output in examples:
        assert_prints(lambda code=example: exec(code, names), output)


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_print_what_they_say(example):
    module = f"arrakis_jax.examples.{example}"
    source = importlib.util.find_spec(module).origin
    docstring = ast.get_docstring(ast.parse(Path(source).read_text()))
    promised = textwrap.dedent(docstring.split("Prints:\n\n")[1])
    assert_prints(lambda: runpy.run_module(module, run_name="__main__"), promised)
    assert f"(arrakis_jax/examples/{example}.py)" in README


def test_set_up_stands_in_the_first_thirty_lines():
    head = README.splitlines()[:30]
    assert [line for line in head if line.startswith("pip install")] == [
        "pip install . && arrakis-jax analyze",
        'pip install ".[test]" && pytest',
    ]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module):
    names = vars(arrakis_jax) | {"jax": jax, "jnp": jnp, "nnx": nnx}
    failed, _ = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert failed == 0


def test_it_names_every_public_function():
    public = {name for name, value in vars(arrakis_jax).items() if inspect.isfunction(value)}
    assert public <= set(re.findall(r"`(\w+)`", README))


def test_it_lists_every_family():
    from arrakis_jax.families import families

    names = {family.name for family in families().values()}
    listed = README.split("### Families")[1].split("[VERIFIED.md]")[0]
    assert set(re.findall(r"\b[a-z][a-z0-9_]*\b", listed)) >= names
    assert f"checkpoints of {len(names)} decoder families" in listed
    assert f"for {len(names)} families" in README.split("```")[0]


@pytest.mark.parametrize(
    "page", ["README.md", "arrakis_jax/families/README.md", "benchmarks/results/README.md"]
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in [h.lower().replace(" ", "-") for h in headings], link
