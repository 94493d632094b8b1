"""Benchmarks that need a process of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.options import ROOT


def fresh(name: str, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Any]:
    """What `python -m benchmarks.NAME` prints, one JSON value a line, as it comes."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | (env or {})
    ) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
