"""Writes arrakis_jax/families/VERIFIED.md: python -m tests.families.verify [FAMILY ...]

What the table says of a family is measured here: on tiny models of Hugging Face with all their
parameters random, saved, loaded and run, in every variant of `cases.py`.
"""

from tests import conftest  # noqa: F401, I001  first: it has XLA compile quickly, as for the tests
import argparse
import datetime
import importlib.metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
import numpy as np

import arrakis_jax
from arrakis_jax import Transformer, decompose, from_pretrained, run
from arrakis_jax.terms.layer import BY
from tests.families import reference
from tests.families.cases import CASES, TINY

FILE = Path(arrakis_jax.__file__).parent / "families" / "VERIFIED.md"
PACKAGES = ("jax", "flax", "transformers", "torch")
TEXT = """# How exact every family is

Written by `python -m tests.families.verify` on {date}, with {versions}, on {device}, in float32.
A test measures two rows again and compares.

Each variant is a tiny model of Hugging Face with every parameter random (gains, biases, sinks and
routers too), saved by `save_pretrained`, loaded by `from_pretrained`, and run on a batch that is
padded on the left. Errors are the largest of all variants:

- logits, stream: against torch's, relative to the largest value (the stream: after every block);
- decomposition: of the terms' sum from the final stream, relative to the largest sum of absolute
  terms, by component, head, neuron and expert;
- padding: of a prompt's logits in a padded batch from those of the prompt alone.

| family | logits | stream | decomposition | padding | variants |
|---|---|---|---|---|---|
{rows}
"""


class Errors(NamedTuple):
    logits: float
    stream: float
    decomposition: float
    padding: float


def versions() -> str:
    found = {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def variants(family: str) -> list[str]:
    return [case for case, (name, _) in CASES.items() if name == family]


def measure(family: str) -> Errors:
    """The largest errors of all variants of a family."""
    found = [_measure(case) for case in variants(family)]
    jax.clear_caches()
    return Errors(*(max(column) for column in zip(*found, strict=True)))


def _measure(case: str) -> Errors:
    torch_model = reference.torch_model(case)
    with TemporaryDirectory() as folder:
        reference.save(torch_model, folder)
        model = from_pretrained(folder)
    tokens, mask = reference.batch(case)
    want = reference.forward(torch_model, tokens, mask)
    out = run(model, tokens, mask=mask, capture="all")
    return Errors(
        logits=_relative(out.logits, want["logits"], mask),
        stream=max(
            _relative(ours, theirs, mask)
            for ours, theirs in zip(out.residuals.resid_post, want["resid_post"], strict=True)
        ),
        decomposition=max(
            _sum_error(decompose(model, out, by=by).terms, out.residuals.final)
            for by in BY
            if by != "expert" or model.config.n_experts
        ),
        padding=_padding(model, tokens, mask),
    )


def _relative(ours: jax.Array, theirs: np.ndarray, mask: np.ndarray) -> float:
    error = np.abs(np.asarray(ours) - theirs)[mask].max()
    return float(error / np.abs(theirs)[mask].max())


def _sum_error(terms: jax.Array, total: jax.Array) -> float:
    wide = np.asarray(terms, np.float64)
    return float(np.abs(wide.sum(0) - np.asarray(total)).max() / np.abs(wide).sum(0).max())


def _padding(model: Transformer, tokens: np.ndarray, mask: np.ndarray) -> float:
    """Three columns of padding more than a batch needs change nothing."""
    wide_tokens = np.pad(tokens, ((0, 0), (3, 0)), constant_values=5)
    wide_mask = np.pad(mask, ((0, 0), (3, 0)))
    padded = np.asarray(run(model, wide_tokens, mask=wide_mask, capture=("logits",)).logits)
    return max(
        _relative(padded[b, -n:], np.asarray(alone), np.ones(n, bool))
        for b in range(2)
        for n in [int(mask[b].sum())]
        for alone in run(model, tokens[b : b + 1, -n:], capture=("logits",)).logits
    )


def rows() -> dict[str, list[str]]:
    """The cells of the table as it is, by family."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row for row in cells[2:]}


def main():
    parser = argparse.ArgumentParser(description="Measures families, and writes VERIFIED.md.")
    parser.add_argument("family", nargs="*", metavar="FAMILY", help="by default all")
    given, old, table = parser.parse_args().family, rows(), []
    if unknown := set(given) - set(TINY):
        parser.error(f"FAMILY must be among {list(TINY)}, got {sorted(unknown)}")
    again = given or list(TINY)
    for family in TINY:
        if family not in again and family in old:
            table.append(f"| {' | '.join(old[family])} |")
            continue
        errors = measure(family)
        numbers = " | ".join(f"{error:.1e}" for error in errors)
        table.append(f"| {family} | {numbers} | {', '.join(variants(family))} |")
        print(table[-1], flush=True)
    text = TEXT.format(
        date=datetime.date.today(),
        versions=versions(),
        device=jax.devices()[0].device_kind,
        rows="\n".join(table),
    )
    FILE.write_text(text)


if __name__ == "__main__":
    main()
