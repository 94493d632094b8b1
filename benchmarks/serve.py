"""One side of a comparison: a process that holds a model, and does jobs when it is told to.

Requests are JSON lines on stdin, answers JSON lines on stdout. Standard library and numpy only, as
it also runs in the peers' environment.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ENOUGH = 0.2  # seconds that one timing takes at the least


@dataclass(frozen=True)
class Job:
    """Attributes:
    run: does the job with what `load` returned, and waits until it is done.
    told: picks from the result what is compared with the other side, as numpy arrays.
    peer: how the job is done, for the table: the function of the library that does it.
    """

    run: Callable[[Any], Any]
    told: Callable[[Any], dict[str, np.ndarray]]
    peer: str = ""


def serve(load: Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]], jobs: dict[str, Job]):
    """Answers requests until stdin ends.

    - `{"do": "load", ...}`: `load` of the request returns the state, and what to answer, to which
      the jobs' names are added.
    - `{"do": "first", "job": name, "save": path}`: runs a job, and stores what it tells.
    - `{"do": "time", "job": name}`: runs it, again and again if it is short; seconds of one run.
    - `{"do": "settle"}`: returns all free memory to the system.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    state = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if request["do"] == "load":
                state, answer = load(request)
                answer = {**answer, "jobs": list(jobs)}
            elif request["do"] == "settle":
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
            else:
                job, runs, seconds = jobs[request["job"]], 0, 0.0
                began = time.perf_counter()
                while runs == 0 or (request["do"] == "time" and seconds < ENOUGH):
                    result = job.run(state)
                    runs, seconds = runs + 1, time.perf_counter() - began
                answer = {"seconds": seconds / runs, "peer": job.peer}
                if request["do"] == "first":
                    np.savez(Path(request["save"]), **job.told(result))
                del result
        except Exception as error:  # the other side goes on, and the table says so
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)
