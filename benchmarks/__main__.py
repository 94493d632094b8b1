"""python -m benchmarks [NAME ...]: runs benchmarks, all of them unless some are named."""

import importlib
import os
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import Options
from benchmarks.report import Report, measured_on
from benchmarks.workloads import WORKLOADS

NAMES = (
    "against_peers", "limit", "scaling", "devices", "first_result", "compile_time", "import_time",
    "bfloat16", "load_memory", "large_model",
)  # fmt: skip
DEVICES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(NAMES))] = None,
    out: Annotated[Path | None, typer.Option(help="write the JSON lines to this file, too")] = None,
    device: Annotated[str, typer.Option(help="cpu, gpu or tpu")] = "cpu",
    model: Annotated[list[str] | None, typer.Option(help="gpt2, llama-1b, shipped or tiny")] = None,
    job: Annotated[list[str] | None, typer.Option(help="of `ours`; all by default")] = None,
    operands: Annotated[
        list[str] | None, typer.Option(help="float32 or bfloat16; both by default")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of which the median counts")] = 5,
    quick: Annotated[bool, typer.Option(help="tiny shapes, to see that all of it runs")] = False,
    peers: Annotated[Path, typer.Option(help="peers' virtual environment")] = Options.peers,
    work: Annotated[Path, typer.Option(help="a folder for made checkpoints")] = Options.work,
) -> None:
    """Prints one JSON line a figure as they come, and tables at the end."""
    chosen = names or list(NAMES)
    unknown = sorted(set(chosen) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"no benchmark {unknown}; there are {', '.join(NAMES)}")
    if not set(operands or ()) <= set(Options.operands):
        raise typer.BadParameter(f"operands must be of {Options.operands}, got {operands}")
    if device not in DEVICES:
        raise typer.BadParameter(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    chosen_models = tuple(model or (("tiny",) if quick else Options.models))
    unknown = sorted(set(chosen_models) - set(WORKLOADS))
    if unknown:
        raise typer.BadParameter(f"no model {unknown}; there are {', '.join(WORKLOADS)}")
    os.environ["JAX_PLATFORMS"] = DEVICES[device]
    if job:
        from benchmarks.ours import JOBS  # imports JAX, which reads the device

        unknown = sorted(set(job) - set(JOBS))
        if unknown:
            raise typer.BadParameter(f"no job {unknown}; there are {'; '.join(JOBS)}")
    options = Options(
        device=device,
        repeats=repeats,
        quick=quick,
        models=chosen_models,
        jobs=tuple(job or ()),
        operands=tuple(operands or Options.operands),
        peers=peers,
        work=work,
    )
    report = Report(out)
    report.add("measured_on", [measured_on()])
    for name in chosen:
        module = importlib.import_module(f"benchmarks.{name}")
        report.add(name, module.figures(options), getattr(module, "COLUMNS", ()))
    report.tables()


if __name__ == "__main__":
    typer.run(main)
