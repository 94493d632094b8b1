"""Compiled, checked entries to the forward, and the decorator that compiles every tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import (
    Mask,
    Tokens,
    checked_layer,
    checked_positions,
    checked_tokens,
    longest_row,
)
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.transformer import Edits, Transformer
from arrakis_jax.stream.capture import Capture, as_capture
from arrakis_jax.stream.edits import Edit, check_edits
from arrakis_jax.stream.residuals import ModelOutput


def cpu_compiler_options() -> dict[str, str]:
    """`compiler_options` for a caller's own outermost `jax.jit` of bfloat16 models on CPU.

    XLA on CPU widens bfloat16 weights for its products. It moves that out of the scan over layers,
    so that a copy of the whole model exists in float32. These options keep it inside the scan.
    Only the outermost jit accepts them. The library's own entries use them already.
    """
    return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def compiled(*static: str) -> Callable:
    """`jax.jit` of a function of a model, with `cpu_compiler_options` where they help."""

    def decorate(function: Callable) -> Callable:
        # Options belong to a jit, not to a call: two programs, and each call chooses one.
        plain = jax.jit(function, static_argnames=static)
        lean = jax.jit(function, static_argnames=static, compiler_options=cpu_compiler_options())

        @wraps(function)
        def call(model: Transformer, *args: Any, **kwargs: Any) -> Any:
            if model.config.dtype == "bfloat16" and _is_outermost_on_cpu((model, args, kwargs)):
                return lean(model, *args, **kwargs)
            return plain(model, *args, **kwargs)

        return call

    return decorate


def _is_outermost_on_cpu(arguments: Any) -> bool:
    # A jit inside another one refuses the options, and other platforms do not need them.
    arrays = [a for a in jax.tree.leaves(arguments) if isinstance(a, jax.Array)]
    # Inside a caller's jit or scan a new array is a tracer, even if no argument is one.
    probe = jnp.zeros(())
    if any(isinstance(a, Tracer) for a in (*arrays, probe)):
        return False
    return all(d.platform == "cpu" for d in arrays[0].devices())


def run(
    model: Transformer,
    tokens: Tokens,
    *,
    mask: Mask | None = None,
    capture: str | tuple[str, ...] | Capture = "residuals",
    edits: Edit | Callable | Iterable[Edit | Callable] = (),
    check: bool = False,
) -> ModelOutput:
    """The forward `model(tokens, ...)`, checked and compiled once per shape and capture.

    Args:
        model: the transformer.
        tokens: `[B,T]` token ids.
        mask: `[B,T]`, True (or 1) at real tokens; None when all are.
        capture: "residuals" (logits and the stream), "all", a tuple of ResidualStream field
            names (with "logits" only if named), or a `Capture`.
        edits: Set, Add, Scale, Project, Replace, or functions `(site, layer, value) -> value`.
            New values, layers and positions of an edit do not recompile.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        Logits `[B,T,V]` and the residual stream, in float32 or wider; zero at padding.

    Raises:
        TypeError, ValueError, IndexError: for tokens, mask, capture or edits that do not fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> out = run(model, tokens, mask=mask, edits=Set("z", 0.0, layer=1, head=2))
        >>> out.logits.shape, out.residuals.resid_mid.shape
        ((2, 4, 451), (4, 2, 4, 128))
    """
    # All checks come before jit, where values can be read and errors name the arguments.
    tokens, mask = checked_tokens(model.config, tokens, mask, check=check)
    edits = checked_edits(model, edits, tokens.shape, mask)
    capture = as_capture(capture)
    checked_positions(capture.positions, tokens.shape, mask)
    return _run(model, tokens, mask, edits, capture=capture)


@compiled("capture")
def _run(model, tokens, mask, edits, *, capture):
    return model(tokens, mask=mask, capture=capture, edits=edits)


def resume(
    model: Transformer,
    x: Float[Array, "B T D"],
    start: int | Int[Array, ""],
    *,
    mask: Mask | None = None,
    edits: Edit | Callable | Iterable[Edit | Callable] = (),
) -> ModelOutput:
    """The rest of the forward: blocks start..L-1 from stream point `x`, then the readout.

    `resume(model, residuals.resid_pre[n], n)` gives the logits of the full forward.

    Args:
        model: the transformer.
        x: `[B,T,D]`, the stream entering block `start`.
        start: an int in [-L, L] (L is the readout alone): the remaining layers are a static slice,
            and the result can be differentiated. Or a traced scalar: one program for all starts,
            which runs only the remaining blocks. Reverse-mode differentiation then raises; so does
            forward mode if products are rounded to bfloat16. Do not vmap over it: every start
            would run every block.
        mask: `[B,T]`, as in the forward that `x` came from.
        edits: as in `run`; only sites from block `start` on are reached.

    Returns:
        Logits, with `final` and `norm_final_scale` in the residual stream.

    Raises:
        ValueError, IndexError: for a stream of another shape, or a block that does not exist.

    Example:
        >>> model, tokenizer = demo_model()
        >>> out = run(model, encode(tokenizer, "Alice and Tom"))
        >>> again = resume(model, out.residuals.resid_pre[2], 2)
        >>> bool(jnp.allclose(again.logits, out.logits, atol=1e-3))
        True
    """
    x = jnp.asarray(x)
    if x.ndim != 3 or x.shape[-1] != model.config.d_model:
        do = "pass one stream point, such as residuals.resid_pre[start]"
        got = f"shape {x.shape}"
        raise ValueError(expected("x", f"`[B,T,{model.config.d_model}]`", got, do))
    if mask is not None:
        # The stream has no tokens, so zeros stand in for them in the check of the mask.
        mask = checked_tokens(model.config, jnp.zeros(x.shape[:2], int), mask)[1]
    start = checked_layer(start, model.config.n_layers, name="start", end=1)
    edits = checked_edits(model, edits, x.shape[:2], mask)
    if isinstance(start, int):
        return _resume_static(model, x, mask, edits, start=start)
    return _resume_traced(model, x, start, mask, edits)


@compiled("start")
def _resume_static(model, x, mask, edits, *, start):
    return model.resume(x, start, mask=mask, edits=edits)


@compiled()
def _resume_traced(model, x, start, mask, edits):
    return model.resume(x, start, mask=mask, edits=edits)


def as_pytree(function: Callable) -> jax.tree_util.Partial:
    """The function as a pytree, which jit takes as an argument. A Partial's arrays are leaves."""
    # Leaves are traced, so new arrays in a Partial do not compile again.
    partial = jax.tree_util.Partial
    return function if isinstance(function, partial) else partial(function)


def checked_edits(
    model: Transformer,
    edits: Edit | Callable | Iterable[Edit | Callable],
    shape: tuple[int, ...],
    mask: Array | None,
) -> Edits:
    """The edits, checked for tokens of this shape. Functions become pytrees, which jit takes."""
    if isinstance(edits, Edit) or callable(edits):
        edits = (edits,)
    if not isinstance(edits, Iterable):
        do = "pass a tuple of Set, Add, Scale, Project, Replace or functions"
        raise TypeError(expected("edits", "edits", repr(edits), do))
    edits = tuple(edits)
    check_edits(edits, model.config, shape[0], longest_row(shape, mask))
    return tuple(e if isinstance(e, Edit) else as_pytree(e) for e in edits)
