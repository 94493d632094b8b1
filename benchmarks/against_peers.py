"""How much faster than TransformerLens, captum and nnsight, and with how much less memory?

Both sides are processes on the same checkpoint, tokens, device and threads; their jobs are run in
turn, first ours, then theirs. What they found is compared first: of results that differ no speed is
told. Of bfloat16 weights, where peers round their activations, too, ours are compared with our own
in float32, and may be as far from it as the peers'. The peers' environment is made by
`benchmarks/peers/setup.sh`.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.options import ROOT, Options
from benchmarks.report import cores
from benchmarks.workloads import WORKLOADS

MODULES = {"ours": "benchmarks.ours", "peers": "benchmarks.peers.worker"}
# The largest difference, relative to the largest value, of results that count as the same: in
# float32, and where operands are rounded to bfloat16.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
SLOW, VERY_SLOW = 20.0, 100.0  # seconds: a job of the peer's that is timed once, or not again
COLUMNS = (
    "job", "products", "seconds", "peer_seconds", "times_as_fast", "difference", "growth_mb",
    "peer_growth_mb", "peer_difference", "error", "peer_error",
)  # fmt: skip


class Side:
    """A process that does jobs, and how much memory it takes for them.

    `loaded` is what it answered to the request to load. One that ends, as the system does with a
    process that takes all memory, has failed in that job alone: the next finds a new process.
    """

    def __init__(self, python: Path, module: str, **request: Any):
        self.command, self.request = [python, "-m", module], request
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.said: list[str] = []
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()
        self.loaded = self._answer("load", **self.request)

    def _listen(self) -> None:
        for line in self.process.stderr or ():
            self.said = [*self.said[-30:], line]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        if self.process.poll() is not None:
            self.close()
            self.start()
        return self._answer(do, **request)

    def _answer(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        except BrokenPipeError:
            return {"error": self._ended()}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": self._ended()}

    def _ended(self) -> str:
        return f"the process ended ({self.process.wait()}): {''.join(self.said)[-2000:]}"

    def growth(self, job: str) -> int | None:
        """The most anonymous resident memory that a job takes beyond what the process holds."""
        self.ask("settle")
        before = most = self._resident()
        if before is None or most is None:
            return None
        done = threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.002):
                most = max(most or 0, self._resident() or 0)

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.ask("time", job=job)
        done.set()
        watcher.join()
        return most - before

    def _resident(self) -> int | None:
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.exists():
            return None
        kilobytes = [x.split()[1] for x in status.read_text().splitlines() if "RssAnon" in x]
        return 1024 * int(kilobytes[0]) if kilobytes else None  # none of one that has ended

    def close(self) -> None:
        self.process.kill()
        self.listener.join()
        with self.process:  # closes its pipes
            pass

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def figures(options: Options) -> Iterator[dict[str, Any]]:
    python = options.peers / "bin" / "python"
    if not python.exists():
        raise SystemExit(
            f"no peers in {options.peers}: run benchmarks/peers/setup.sh, or name their virtual "
            "environment by --peers"
        )
    for name in options.models:
        yield from of_model(name, python, options)


def of_model(name: str, python: Path, options: Options) -> Iterator[dict[str, Any]]:
    workload = WORKLOADS[name]
    folder = ROOT / "arrakis_jax" / "demo" / "model"
    if workload.shape is not None:
        folder = options.work / name
        made = [python, "-m", "benchmarks.peers.checkpoints", name, folder]
        subprocess.run(made, cwd=ROOT, check=True, stdout=sys.stderr)
    request = {
        "workload": name, "checkpoint": str(folder), "device": options.device,
        "threads": cores(),
    }  # fmt: skip

    def loading(which: str, dtype: str, precision: str) -> Side:
        runs = python if which == "peers" else Path(sys.executable)
        side = Side(runs, MODULES[which], **request, dtype=dtype, precision=precision)
        if "error" in side.loaded:
            side.close()
            raise SystemExit(f"{which} cannot load {name}: {side.loaded['error']}")
        return side

    with ExitStack() as stack:
        exact = None
        if workload.dtype == "bfloat16":  # all of it first, so that its model is gone
            exact = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with loading("ours", "float32", "highest") as side:
                for job in options.jobs or side.loaded["jobs"]:
                    side.ask("first", job=job, save=str(exact / f"{job}.npz"))
        peer = stack.enter_context(loading("peers", workload.dtype, "highest"))
        yield {"model": name, "peers": peer.loaded}
        sides = {}
        for operands in options.operands:
            rounded = operands == "bfloat16"
            precision, dtype = ("default", "bfloat16") if rounded else ("highest", workload.dtype)
            side = stack.enter_context(loading("ours", dtype, precision))
            sides["bfloat16 operands" if rounded else "float32"] = side
        saved = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = []
        for job in peer.loaded["jobs"]:
            if options.jobs and plain(job) not in options.jobs:
                continue
            wanted = None if exact is None else exact / f"{plain(job)}.npz"
            for figure in of_job(job, peer, sides, saved, options, wanted):
                found.append(figure)
                yield {"model": name, **figure}
            shutil.rmtree(saved)
            saved.mkdir()
    for products in sides:
        own: dict[str, float] = {}
        fastest: dict[str, float] = {}
        for figure in found:
            ratio = figure.get("times_as_fast")
            if figure["products"] == products and ratio is not None:
                job = plain(figure["job"])
                fastest[job] = min(fastest.get(job, ratio), ratio)
                own |= {job: ratio} if job == figure["job"] else {}
        for what, ratios in (("the libraries' own functions", own), ("the fastest peer", fastest)):
            if ratios:
                yield {
                    "model": name,
                    "job": f"geometric mean of {len(ratios)} jobs, against {what}",
                    "products": products,
                    "times_as_fast": statistics.geometric_mean(ratios.values()),
                }


def plain(job: str) -> str:
    """A job's name without that of a variant."""
    return job.split(" (")[0]


def of_job(
    job: str,
    peer: Side,
    sides: dict[str, Side],
    saved: Path,
    options: Options,
    exact: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """A figure for each of our sides; what they found is compared with the peer's, or `exact`."""
    own = plain(job)
    wanted = saved / "peer.npz" if exact is None else exact
    theirs = peer.ask("first", job=job, save=str(saved / "peer.npz"))
    first = {
        products: side.ask("first", job=own, save=str(saved / f"{products}.npz"))
        for products, side in sides.items()
    }
    times: dict[str, list[float]] = {products: [] for products in ("peer", *sides)}
    took = theirs.get("seconds", 0)
    for _ in range(options.repeats if took < SLOW else 1):
        for products, side in sides.items():
            times[products].append(side.ask("time", job=own).get("seconds", float("nan")))
        if "error" not in theirs:
            again = theirs if took > VERY_SLOW else peer.ask("time", job=job)
            theirs = again if "error" in again else theirs
            times["peer"].append(again.get("seconds", float("nan")))
    peer_growth = None if "error" in theirs or took > VERY_SLOW else peer.growth(job)
    for products, side in sides.items():
        figure: dict[str, Any] = {"job": job, "products": products}
        if "error" in first[products]:
            yield figure | {"error": first[products]["error"]}
            continue
        figure |= spread("", times[products])
        figure |= {"first_call_seconds": first[products]["seconds"]}
        figure |= megabytes("growth_mb", side.growth(own))
        if "error" in theirs:
            yield figure | {"peer_error": theirs["error"]}
            continue
        figure |= {"peer": theirs["peer"]} | spread("peer_", times["peer"])
        figure |= megabytes("peer_growth_mb", peer_growth)
        if not wanted.exists():
            yield figure | {"error": "no float32 result to compare with"}
            continue
        rounded = exact is not None or products != "float32"
        most = TOLERANCE["bfloat16" if rounded else "float32"]
        figure["difference"] = error = difference(saved / f"{products}.npz", wanted)
        if exact is not None:
            figure["peer_difference"] = difference(saved / "peer.npz", wanted)
            most = max(most, figure["peer_difference"])
        if error <= most:
            figure["times_as_fast"] = figure["peer_seconds"] / figure["seconds"]
        else:
            figure["error"] = f"results differ by more than {most}"
        yield figure


def spread(prefix: str, seconds: list[float]) -> dict[str, float]:
    return {
        f"{prefix}seconds": statistics.median(seconds),
        f"{prefix}least": min(seconds),
        f"{prefix}most": max(seconds),
    }


def megabytes(name: str, size: int | None) -> dict[str, float]:
    return {} if size is None else {name: size / 1e6}


def difference(ours: Path, theirs: Path) -> float:
    """The largest of all arrays, relative to the largest value of each."""
    with np.load(ours) as a, np.load(theirs) as b:
        if set(a) != set(b):
            raise SystemExit(f"the sides tell different things: {sorted(a)} and {sorted(b)}")
        return max(relative(a[name], b[name]) for name in a)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
