"""python -m benchmarks.plot RESULTS.jsonl ... --out FILE.png: speed-ups over the peers, as bars.

Reads the JSON lines of `against_peers`; matplotlib comes with the extra "benchmarks".
"""

import json
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator
from PIL import Image

MEAN = "geometric mean"
COLOURS = {"float32": "#1f4e8c", "bfloat16 operands": "#e08a1e"}
INK, GRID, SPREAD = "#24292f", "#d0d7de", "#8c959f"
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
matplotlib.rcParams |= {
    "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": GRID, "figure.facecolor": "white",
}  # fmt: skip

Line = dict[str, Any]


def main(
    results: Annotated[list[Path], typer.Argument(help="JSON lines of against_peers")],
    out: Annotated[Path, typer.Option(help="the picture to write")],
) -> None:
    """Draws one panel for each model, one bar for each job and kind of products."""
    lines = [json.loads(line) for file in results for line in file.read_text().splitlines()]
    device = next((x["device"] for x in lines if x.get("benchmark") == "measured_on"), "")
    lines = [x for x in lines if x.get("benchmark") == "against_peers" and "job" in x]
    models = list(dict.fromkeys(x["model"] for x in lines))
    if not models:
        raise typer.BadParameter("no line of these files is of against_peers")
    panels = {model: [x for x in lines if x["model"] == model] for model in models}
    picture = BytesIO()
    draw(panels, device).savefig(picture, dpi=110, bbox_inches="tight", pad_inches=0.15)
    Image.open(picture).convert("RGB").quantize(32).save(out, format="png", optimize=True)


def draw(panels: dict[str, list[Line]], device: str) -> Figure:
    rows = [len(jobs_of(lines)) for lines in panels.values()]
    figure = Figure(figsize=(9, 0.9 + sum(0.36 * n + 0.7 for n in rows)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=rows)[:, 0]
    ratios = [x["times_as_fast"] for lines in panels.values() for x in lines if faster(x)]
    for ax, (model, lines) in zip(axes, panels.items(), strict=True):
        panel(ax, model, lines)
    axes[-1].set_xlim(min([0.8, *(0.8 * r for r in ratios)]), max([4, *(1.6 * r for r in ratios)]))
    axes[-1].set_xlabel("times as fast as the peer (log scale)" + f", on {device}" * bool(device))
    shown = {x["products"] for lines in panels.values() for x in lines}
    kinds = [Patch(color=colour, label=name) for name, colour in COLOURS.items() if name in shown]
    figure.legend(handles=kinds, loc="outside upper right", ncols=2, frameon=False)
    return figure


def panel(ax: Axes, model: str, lines: list[Line]) -> None:
    jobs = jobs_of(lines)
    products = [p for p in COLOURS if any(x["products"] == p for x in lines)]
    height = 0.8 / len(products)
    for i, name in enumerate(products):
        of = {x["job"]: x for x in lines if x["products"] == name}
        places = [j - 0.4 + height * (i + 0.5) for j in range(len(jobs))]
        for y, job in zip(places, jobs, strict=True):
            bar(ax, y, height, of.get(job, {}), COLOURS[name])
    ax.set_yticks(range(len(jobs)), jobs)
    ax.set_ylim(len(jobs) - 0.4, -0.6)
    ax.tick_params(length=0)
    ax.set_xscale("log")
    ax.set_xticks(TICKS, [f"{t:g}×" for t in TICKS])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.axvline(1, color=INK, linewidth=1.2)
    title = [model]
    for name in products:
        means = [
            f"{x['times_as_fast']:.1f}× {x['job'].split(', ')[1]}"
            for x in lines
            if MEAN in x["job"] and x["products"] == name
        ]
        title += [f"{MEAN}, {name}: {', '.join(means)}"] if means else []
    ax.set_title("\n".join(title), loc="left", fontsize=10, fontweight="bold")


def bar(ax: Axes, y: float, height: float, line: Line, colour: str) -> None:
    """From 1x to the median, with a whisker for the spread."""
    if not faster(line):
        why = "results differ" if "differ" in line.get("error", "") else "ours fails"
        why = "the peer does not do it" if "peer_error" in line else why
        ax.text(1.03, y, why, va="center", fontsize=8, fontstyle="italic")
        return
    ratio = line["times_as_fast"]
    ax.barh(y, ratio - 1, height * 0.92, left=1, color=colour)
    ends = (line["peer_least"] / line["most"], line["peer_most"] / line["least"])
    ax.plot(ends, (y, y), color=SPREAD, linewidth=1.2)
    ax.text(1.04 * max(1, ends[1]), y, f"{ratio:.1f}×", va="center", fontsize=9)


def jobs_of(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(x["job"] for x in lines if MEAN not in x["job"]))


def faster(line: Line) -> bool:
    return "times_as_fast" in line and MEAN not in line["job"]


if __name__ == "__main__":
    typer.run(main)
