"""The package as a whole: what is public, what imports what, and how it is documented."""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from pathlib import Path

import arrakis_jax

ROOT = Path(arrakis_jax.__file__).parent

# A module imports only from lines above its own.
LAYERS = (
    ("core",),
    ("results",),
    ("stream",),
    ("nn",),
    ("families", "frozen"),
    ("forward", "checkpoint"),
    ("terms", "text"),
    ("decomposition", "movement", "attribution", "circuits"),
    ("patching",),
    ("edges",),
    ("evaluation",),
    ("demo", "residual_tools"),
    ("cli", "examples"),
)
ANALYSIS = (
    "decomposition",
    "movement",
    "attribution",
    "circuits",
    "patching",
    "edges",
    "terms",
    "frozen",
    "evaluation",
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "arrakis_jax":
            found.add(node.module)
            if not node.module.startswith("arrakis_jax"):  # what is imported may be a module
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def unit(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def test_imports_point_upwards():
    line = {name: i for i, names in enumerate(LAYERS) for name in names}
    sources = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert {unit(path) for path in sources} == set(line)
    wrong = []
    for path in sources:
        for module in imports(path):
            if module.startswith("arrakis_jax."):
                target = module.split(".")[1]
                above = line[target] < line[unit(path)] or target == unit(path)
                loading = target in ("families", "checkpoint") and unit(path) in ANALYSIS
                if not above or loading or (unit(path) == "families" and target == "nn"):
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


PUBLIC = {
    name for name, value in vars(arrakis_jax).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}  # fmt: skip


def test_the_packages_docstring_has_these_layers():
    rows = re.findall(r"^    (\d+) +(\w+) ", arrakis_jax.__doc__ or "", re.MULTILINE)
    layers = [(str(i), name) for i, names in enumerate(LAYERS, 1) for name in names]
    assert rows == layers


def test_the_public_names_are_these():
    promised = """
        ModelConfig config_for Transformer run resume ModelOutput ResidualStream Capture capture_for
        Set Add Scale Project Replace from_pretrained tokenizer_for encode token_id save demo_model
        residual_decomposition decompose logit_attribution Label residual_movement Movement
        movement_matrix feature_attribution Attribution residual_gradients ResidualTools
        Decomposition NotCapturedError CheckpointError cpu_compiler_options
    """.split()
    assert set(promised) <= PUBLIC


def test_a_star_import_brings_the_tools_alone():
    assert arrakis_jax.__all__ == sorted(arrakis_jax.__all__)
    tools = {name for name in PUBLIC if inspect.isfunction(getattr(arrakis_jax, name))}
    assert set(arrakis_jax.__all__) == tools - {"run", "resume", "save"}


def test_a_checkout_that_is_not_installed_can_be_imported():
    code = f"""
import importlib.metadata, sys
sys.path.insert(0, {str(ROOT.parent)!r})
def version(name, known=importlib.metadata.version):
    if name == "arrakis-jax":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
import arrakis_jax
print(arrakis_jax.__version__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == importlib.metadata.version("arrakis-jax")


def test_public_names_are_documented():
    for name in sorted(PUBLIC):
        thing = getattr(arrakis_jax, name)
        text = inspect.getdoc(thing) or ""
        assert text and not text.startswith(f"{name}("), name
        if inspect.isfunction(thing) and len(inspect.signature(thing).parameters) > 2:
            assert "Args:" in text, name


def test_help_names_types():
    """`help` shows `tokens: 'Tokens'`, and not what the name stands for."""
    for name in sorted(PUBLIC):
        thing = getattr(arrakis_jax, name)
        if inspect.isfunction(thing):
            signature = str(inspect.signature(thing))
            assert not re.search(r"jaxtyping|numpy\.|arrakis_jax\.", signature), signature


def test_four_positional_arguments_at_most():
    for name in sorted(PUBLIC):
        thing = getattr(arrakis_jax, name)
        if inspect.isfunction(thing):
            kinds = [p.kind for p in inspect.signature(thing).parameters.values()]
            assert kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD) <= 4, name


def test_import_is_light():
    code = "import arrakis_jax, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    for heavy in ("torch", "transformers", "orbax", "matplotlib", "typer", "tensorstore"):
        assert not any(m == heavy or m.startswith(f"{heavy}.") for m in loaded), heavy


def test_top_level_holds_only_what_it_should():
    root = ROOT.parent
    if not (root / "pyproject.toml").exists():
        return  # installed without its sources
    found = {path.name for path in root.iterdir() if not path.name.startswith(".")}
    built = {"build", "dist", "arrakis_jax.egg-info"}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "arrakis_jax", "tests", "benchmarks"}
    assert found - built <= wanted


def test_tests_stand_alone():
    """No test file imports another or the benchmarks, whose own tests lie beside them."""
    tests = Path(__file__).parent
    wrong = [
        f"{path.relative_to(tests)} imports {module}"
        for path in tests.rglob("*.py")
        for module in imports(path)
        if module.split(".")[0] == "benchmarks"
        or any(name.startswith("test_") for name in module.split("."))
    ]
    assert not wrong
    benchmarks = tests.parent / "benchmarks"
    assert {path.name for path in benchmarks.rglob("test_*.py")} == {"test_benchmarks.py"}
    assert not list(tests.rglob("test_benchmarks.py"))


def public_definitions(path: Path) -> set[str]:
    """The names that a module defines itself at its top level, without those that it imports."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_is_defined_once():
    """One name, one thing. Examples are programs, whose names are nobody's but theirs."""
    modules: dict[str, list[str]] = {}
    for path in ROOT.rglob("*.py"):
        if unit(path) != "examples":
            for name in public_definitions(path):
                modules.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in modules.items() if len(paths) > 1}


def test_one_walk_over_the_layers():
    """Only nn/ goes over the stacks of layers, and only a norm and frozen/ know its linear map."""
    for path in ROOT.rglob("*.py"):
        room, text = unit(path), path.read_text()
        assert room == "nn" or ".stacks()" not in text, path
        assert room in ("nn", "frozen") or ".gained(" not in text, path


def test_functions_and_files_are_short():
    """At most 400 lines in a file; at most 60 in a function, without its docstring."""
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{path}: {node.name}"


def test_exhaustive_tests_leave_some_of_every_file():
    """No file of tests is exhaustive as a whole: what it tests is tested by default, too."""
    for path in Path(__file__).parent.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        tests = [f for f in functions if f.name.startswith("test_")]
        marked = [f for f in tests if any("exhaustive" in ast.dump(d) for d in f.decorator_list)]
        assert len(marked) < len(tests), path.name
