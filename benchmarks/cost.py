"""What a function costs, as JAX tells it: products, temporary memory, compile time; and a clock."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from tests.cost import flops_of


@dataclass(frozen=True)
class Program:
    """A compiled function.

    Attributes:
        call: runs it.
        seconds: that tracing and compiling it took.
        flops: of all its products.
        temporary: bytes of temporary memory.
    """

    call: Callable
    seconds: float
    flops: int
    temporary: int


def cold(function: Callable, *args: Any) -> Program:
    """The function compiled with all of JAX's caches empty; arguments may be shapes."""
    cached = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    jax.clear_caches()
    began = time.perf_counter()
    traced = jax.jit(function).trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    jax.config.update("jax_enable_compilation_cache", cached)
    memory = compiled.memory_analysis().temp_size_in_bytes
    return Program(compiled, seconds, flops_of(traced.jaxpr.jaxpr), memory)


@contextmanager
def persistent_cache(folder: str) -> Iterator[None]:
    """JAX keeps compiled programs, however small, in this folder, and finds them again."""
    options = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # so that the folder is looked at
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def clocked(function: Callable, *args: Any) -> float:
    """Seconds of a call, until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - began


def sustained(function: Callable, *args: Any, least: float = 0.5) -> float:
    """Seconds of one of as many calls as take this long."""
    calls, began = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - began < least:
        jax.block_until_ready(function(*args))
        calls += 1
    return (time.perf_counter() - began) / calls


def medians(repeats: int, calls: dict[Any, Callable[[], float]]) -> dict[Any, float]:
    """The median of what each call returns; in turns, so that all meet the same disturbances.

    The first time that each is called does not count.
    """
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            found[name].append(call())
    return {name: statistics.median(values[1:]) for name, values in found.items()}
