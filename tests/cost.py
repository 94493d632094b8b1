"""What a function costs, as JAX tells it: products and memory, counted without running it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def dots(jaxpr: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every dot_general in a jaxpr, with how often it is run; a `while` loop's body counts once."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for value in jax.tree.leaves(
            tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from dots(value, inner)


def flops_of(jaxpr: Any) -> int:
    """The floating-point operations of all products in a jaxpr."""
    total = 0
    for eqn, times in dots(jaxpr):
        left = eqn.invars[0].aval.shape
        contracted = math.prod(left[i] for i in eqn.params["dimension_numbers"][0][0])
        total += 2 * times * contracted * math.prod(eqn.outvars[0].aval.shape)
    return total


def flops(function: Callable, *args: Any) -> int:
    """The floating-point operations of all products of a function; arguments may be shapes."""
    return flops_of(jax.make_jaxpr(function)(*args).jaxpr)


def temporary(function: Callable, *args: Any) -> int:
    """Bytes of temporary memory of a compiled function; arguments may be shapes."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def arrays(jaxpr: Any) -> Iterator[int]:
    """The size of every intermediate of a jaxpr, with those inside of its loops."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for value in jax.tree.leaves(
            tuple(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from arrays(value)
