"""The command line: `arrakis-jax analyze`, `arrakis-jax info` and `arrakis-jax convert`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from arrakis_jax import __version__
from arrakis_jax.attribution.feature_attribution import feature_attribution
from arrakis_jax.checkpoint import from_pretrained, new_folder, save
from arrakis_jax.core.errors import expected
from arrakis_jax.decomposition.logit_attribution import LogitAttribution, logit_attribution
from arrakis_jax.demo import FOLDER
from arrakis_jax.forward.compilation_cache import compilation_cache
from arrakis_jax.forward.run import run
from arrakis_jax.movement.residual_movement import movement
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.terms.capture import capture_for
from arrakis_jax.text import continuation, copy_tokenizer, encode, token_id, tokenizer_for

# Analysed by default: a sentence, and the name that must not follow it.
SENTENCE, OTHER = "When Mary and John went to the store, John gave a drink to", " John"

app = typer.Typer(
    help="Takes the residual stream of a transformer apart.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"arrakis-jax {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="tell the version")
    ] = False,
) -> None:
    """Takes the residual stream of a transformer apart."""


@app.command()
def analyze(
    text: Annotated[str, typer.Argument(help="the prompt")] = SENTENCE,
    model: Annotated[
        str | None,
        typer.Option(help="a checkpoint's folder or hub id (the shipped model if left out)"),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="one token, such as ' Mary' (the prediction if left out)")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="one token (the likeliest other one if left out)")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="also write the numbers to this file")
    ] = None,
) -> None:
    """Explains a model's next token: what wrote its logit, how the stream moved, which inputs."""
    with _one_line_errors():
        if not text.strip():
            do = "see --help"
            raise ValueError(expected("text", "a text of at least one token", repr(text), do))
        if json_file is not None and (
            json_file.is_dir() or not json_file.absolute().parent.is_dir()
        ):
            must, do = "a file in an existing folder", "name a file, and make its folder first"
            raise ValueError(expected("--json", must, repr(str(json_file)), do))
        compilation_cache()
        source = FOLDER if model is None else model
        # The default sentence is asked about its two names.
        if text == SENTENCE and target is None and against is None and model is None:
            against = OTHER
        network = from_pretrained(source)
        result = analysis(network, tokenizer_for(source), text, target, against)
        if json_file is not None:
            json_file.write_text(json.dumps(result, indent=1) + "\n")
    _print(result, Console())


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="a checkpoint's folder or hub id")],
) -> None:
    """Loads a checkpoint and describes it."""
    with _one_line_errors():
        network = from_pretrained(model)
    table = _sizes(network, str(model))
    for field in fields(network.config):
        table.add_row(field.name, str(getattr(network.config, field.name)))
    Console().print(table)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="a checkpoint's folder or hub id")],
    out: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default as stored")
    ] = None,
) -> None:
    """Writes a checkpoint in this package's own form, with its tokenizer's files."""
    with _one_line_errors():
        # Checked before the model is loaded, which may take minutes.
        new_folder(out, name="out")
        network = from_pretrained(model, dtype=dtype)
        save(network, out)
        copied = copy_tokenizer(model, out)
    table = _sizes(network, str(out))
    table.add_row("dtype", network.config.dtype)
    table.add_row("tokenizer", ", ".join(copied) or "none found; put its files there")
    Console().print(table)


def _sizes(network: Transformer, title: str) -> Table:
    leaves = jax.tree.leaves(network)
    table = Table(title=escape(title), show_header=False)
    table.add_row("parameters", f"{sum(leaf.size for leaf in leaves):,}")
    table.add_row("bytes", f"{sum(leaf.nbytes for leaf in leaves):,}")
    return table


def analysis(
    model: Transformer, tokenizer: Any, text: str, target: str | None, against: str | None
) -> dict[str, Any]:
    """The numbers that `analyze` prints, as JSON can hold them."""
    tokens, mask = encode(tokenizer, text)
    # One forward serves both attributions, the movement and the prediction.
    fields_needed = {*capture_for("component"), *capture_for("head"), "resid_pre", "logits"}
    out = run(model, tokens, mask=mask, capture=tuple(sorted(fields_needed)))
    # A stable order, so that equal logits give the same answer everywhere.
    order = np.argsort(-np.asarray(out.logits[0, -1]), stable=True)
    goal = int(order[0]) if target is None else _token(tokenizer, target, "--target")
    if against is None:
        rival = int(order[0] if order[0] != goal else order[1])
    else:
        rival = _token(tokenizer, against, "--against")
    if goal == rival:
        do = "choose two different tokens"
        raise ValueError(expected("--against", "another token than --target", repr(against), do))

    def attribute(by: str) -> LogitAttribution:
        return logit_attribution(model, out, goal, against=rival, by=by)

    components, heads = attribute("component"), attribute("head")
    inputs = feature_attribution(
        model, tokens, goal, against=rival, mask=mask, method="integrated_gradients"
    )
    stream = out.residuals
    moved = movement(stream.resid_pre[:, 0, -1], stream.resid_post[:, 0, -1])
    return {
        "text": text,
        "prediction": continuation(tokenizer, int(order[0])),
        "target": continuation(tokenizer, goal),
        "against": continuation(tokenizer, rival),
        "logit_difference": float(components.logit[0]),
        "constant": float(components.constant[0]),
        "gap": float(components.gap[0]),
        "components": _terms(components),
        "heads": [term for term in _terms(heads) if term["kind"] == "head"],
        "movement": [
            {
                "layer": layer,
                "relative_norm": float(moved.relative_norm[layer]),
                "cosine": float(moved.cosine[layer]),
                "angle": float(moved.angle[layer]),
            }
            for layer in range(model.config.n_layers)
        ],
        "tokens": [
            {"token": continuation(tokenizer, int(token)), "value": float(value)}
            for token, value in zip(tokens[0], inputs.tokens[0], strict=True)
        ],
    }


def _token(tokenizer: Any, text: str, option: str) -> int:
    try:
        return token_id(tokenizer, text)
    # The message names the function's argument; a user of the command line knows the option.
    except ValueError as error:
        raise ValueError(str(error).replace("`text`", f"`{option}`", 1)) from None


def _terms(attribution: LogitAttribution) -> list[dict[str, Any]]:
    values = np.asarray(attribution.terms[:, 0], float)
    return [
        {"layer": label.layer, "kind": label.kind, "index": label.index, "value": float(value)}
        for label, value in zip(attribution.labels, values, strict=True)
    ]


def _print(result: dict[str, Any], console: Console) -> None:
    prediction = escape(result["prediction"].removeprefix(" "))
    console.print(f"[bold]{escape(result['text'])}[/] → {prediction}")
    difference = result["logit_difference"]
    names = escape(f"logit of {result['target']!r} less that of {result['against']!r}")
    console.print(f"{names}: {difference:+.3f}\n")
    total = sum(term["value"] for term in result["components"]) + result["constant"]
    table = _table("What writes the difference", "component", "logits")
    for term in result["components"]:
        table.add_row(_name(term), *_bar(term["value"], result["components"]))
    table.add_row("constant", f"{result['constant']:+.3f}", "")
    table.add_section()
    table.add_row("sum", f"{total:+.3f}", f"the model's own {difference:+.3f}")
    console.print(table)

    table = _table("The ten heads that write most of it", "head", "logits")
    for term in sorted(result["heads"], key=lambda term: -abs(term["value"]))[:10]:
        table.add_row(_name(term), *_bar(term["value"], result["heads"]))
    console.print(table)

    table = Table(title="How far the stream moves at the last token")
    for heading in ("layer", "|change| / |stream|", "cosine", "angle (rad)"):
        table.add_column(heading, justify="right")
    for row in result["movement"]:
        numbers = (row["relative_norm"], row["cosine"], row["angle"])
        table.add_row(str(row["layer"]), *(f"{number:.3f}" for number in numbers))
    console.print(table)

    table = _table("Which input tokens caused it", "token", "logits")
    for row in result["tokens"]:
        table.add_row(escape(repr(row["token"])), *_bar(row["value"], result["tokens"]))
    # The sum is the difference minus its value at the baseline, so the rest is that value.
    total = sum(row["value"] for row in result["tokens"])
    table.add_section()
    table.add_row("sum", f"{total:+.3f}", f"without them {difference - total:+.3f}")
    table.caption = "integrated gradients, from the mean embedding"
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title)
    table.add_column(headings[0])
    table.add_column(headings[1], justify="right")
    table.add_column("", width=24)
    return table


def _bar(value: float, among: list[dict[str, Any]]) -> tuple[str, str]:
    """A value as text, and a bar whose length is its share of the largest value."""
    largest = max((abs(other["value"]) for other in among), default=0) or 1
    length = round(24 * abs(value) / largest)
    return f"{value:+.3f}", f"[{'green' if value > 0 else 'red'}]{'━' * length}[/]"


def _name(term: dict[str, Any]) -> str:
    if term["layer"] is None:
        return term["kind"]
    index = "" if term["index"] is None else f" {term['index']}"
    return f"layer {term['layer']} {term['kind']}{index}"


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Wrong input ends in one line and exit code 2, instead of a traceback."""
    try:
        yield
    except (ValueError, TypeError, IndexError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
