"""What a run of the benchmarks can be told."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Attributes:
    device: "cpu", "gpu" or "tpu"; peers run on the same one.
    repeats: how often a job is timed; the median counts.
    quick: shapes so small that every benchmark only shows that it runs.
    models: names of `workloads.WORKLOADS`.
    jobs: of the jobs of `ours`, those to do; all if none is named.
    operands: what our products multiply beside the peers': "float32" (the weights as they are),
        "bfloat16" (rounded, with sums in float32).
    peers: the peers' virtual environment, as `peers/setup.sh` makes it.
    work: a folder for checkpoints that are made for the benchmarks.
    """

    device: str = "cpu"
    repeats: int = 5
    quick: bool = False
    models: tuple[str, ...] = ("gpt2",)
    jobs: tuple[str, ...] = ()
    operands: tuple[str, ...] = ("float32", "bfloat16")
    peers: Path = ROOT / ".venv-peers"
    work: Path = ROOT / ".benchmarks"
