"""Which input tokens caused a target: gradients, integrated gradients and perturbations."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.inputs import anywhere, checked_baseline
from arrakis_jax.attribution.integrated_gradients import DOUBLINGS, RULES, integrated_gradients
from arrakis_jax.attribution.perturb import occlusion, value_zeroing
from arrakis_jax.attribution.result import NORMS, Attribution
from arrakis_jax.attribution.saliency import at_input, smooth_grad
from arrakis_jax.core.axes import Array
from arrakis_jax.core.checks import (
    Ids,
    Mask,
    Tokens,
    checked_choice,
    checked_seed,
    checked_tokens,
    host,
)
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.targets import Target, checked_target
from arrakis_jax.nn.transformer import Transformer

# Each method's function, and its options with their defaults.
METHODS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "saliency": (at_input, dict(norm="l2")),
    "grad_x_input": (partial(at_input, norm="signed"), {}),
    "smooth_grad": (
        smooth_grad,
        dict(norm="l2", samples=50, noise=0.15, seed=0, step_batch=1),
    ),
    "integrated_gradients": (
        integrated_gradients,
        dict(rule="gauss_legendre", steps=None, tolerance=1e-3, baseline=None, step_batch=1),
    ),
    "occlusion": (occlusion, dict(baseline=None, step_batch=1)),
    "value_zeroing": (value_zeroing, dict(step_batch=1)),
}
CHOICES = {"norm": tuple(NORMS), "rule": RULES}
COUNTS = ("steps", "samples", "step_batch")


def feature_attribution(
    model: Transformer,
    input_ids: Tokens,
    target_ids: Ids | Target | Callable,
    *,
    method: str = "grad_x_input",
    against: Ids | None = None,
    position: int | Array = -1,
    mask: Mask | None = None,
    norm: str | None = None,
    baseline: str | int | Array | None = None,
    rule: str | None = None,
    steps: int | None = None,
    tolerance: float | None = None,
    samples: int | None = None,
    noise: float | None = None,
    seed: int | None = None,
    step_batch: int | None = None,
    check: bool = False,
) -> Attribution:
    """Attributes a target, such as a logit, to the input tokens.

    With `e` the token embedding, `f` the target and `g` its gradient with respect to `e` (learned
    positions are always kept), the methods are:

    - "saliency": the norm of `g`;
    - "grad_x_input": `g . e`;
    - "smooth_grad": the norm of the mean of `g` over embeddings with Gaussian noise;
    - "integrated_gradients": `(e - b) .` the mean of `g` on the straight way from a baseline `b`
      to `e`; the sum over tokens is `f(e) - f(b)` up to `delta`;
    - "occlusion": `f(e) - f(e with b in place of this token's)`;
    - "value_zeroing": `f(e) - f(e with this token's values zero in every layer)`, so that nothing
      reads it by attention, itself included.

    An option that a method does not have must be left out.

    Args:
        model: the transformer.
        input_ids: `[B,T]` token ids.
        target_ids: the token whose logit is attributed, an int or `[B]`; or any target, such as
            `LogProb(3)`, or a function of logits.
        method: one of the above.
        against: a token whose logit is subtracted, or None.
        position: where the logit is read, counted in real tokens: an int or `[B]`.
        mask: `[B,T]`.
        norm: of saliency and smooth_grad: "l2" (default), "l1", or "signed", which is `g . e`.
        baseline: of integrated_gradients and occlusion: "mean" (default), the mean embedding;
            "zero"; a neutral token's id; `[B,T]` token ids, such as a counterfactual prompt; or
            `[D]`, `[T,D]` or `[B,T,D]` token embeddings. Zero is a bad start of a path in models
            with RMSNorm and no learned positions: the norm makes the path near it all but singular.
        rule: of integrated_gradients, the quadrature: "gauss_legendre" (default), "left", "right",
            "midpoint" or "trapezoid".
        steps: of integrated_gradients, the rule's nodes (of "trapezoid" the intervals). None
            doubles them from 32 to 512, row by row, until the row's gap is at most `tolerance`,
            and warns naming the rows where that is not enough (nothing is warned inside a caller's
            jit: look at `gap`). In models with experts it may never be: where a token changes its
            experts on the way the logit jumps, which no gradient sees, and `delta` holds the
            jumps. Reverse-mode differentiation of the result needs an int.
        tolerance: of integrated_gradients without `steps`: the largest gap, 1e-3 by default.
        samples: of smooth_grad, how many gradients are averaged (50 by default).
        noise: of smooth_grad, the noise's standard deviation as a fraction of that of the
            embedding table (0.15 by default).
        seed: of smooth_grad (0 by default). Noise depends on it, the sample and the token's
            position counted in real tokens, and is the same in every row.
        step_batch: how many steps, samples or positions are run at once at most (1 by default):
            more need more memory, less time where a device is not full, and change nothing else.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        An Attribution in the target's units (saliency and smooth_grad with a norm other than
        "signed": per unit of embedding); zero at padding.

    Raises:
        TypeError, ValueError, IndexError: for tokens, targets or options that do not fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> found = feature_attribution(
        ...     model, tokens, alice, against=tom, mask=mask, method="integrated_gradients"
        ... )
        >>> found.tokens.shape, bool(found.gap.max() <= 1e-3)
        ((1, 11), True)
        >>> found.to_table(tokenizer)["token"][1]
        ' Alice'

    Reference:
        Simonyan et al. 2014 (saliency); Smilkov et al. 2017 (SmoothGrad); Sundararajan et al. 2017
        (integrated gradients); Zeiler & Fergus 2014 (occlusion); Mohebbi et al. 2023, who zero
        values, and measure what that changes in representations rather than in a target.
    """
    checked_choice("method", method, tuple(METHODS))
    tokens, mask = checked_tokens(model.config, input_ids, mask, check=check, name="input_ids")
    target = checked_target(
        model, tokens, target_ids, mask, against=against, position=position, name="target_ids"
    )
    given = dict(
        norm=norm, baseline=baseline, rule=rule, steps=steps, tolerance=tolerance,
        samples=samples, noise=noise, seed=seed, step_batch=step_batch,
    )  # fmt: skip
    options = _checked_options(model.config, method, given)
    if "baseline" in options:
        start = checked_baseline(model.config, baseline, tokens, mask, check=check)
        if method == "integrated_gradients" and _singular(model, start, tokens, mask):
            warnings.warn(
                "a zero baseline in a model with RMSNorm and no learned positions makes "
                "integrated gradients unreliable: the norm's output jumps at zero; use the mean "
                "embedding (baseline=None)",
                stacklevel=2,
            )
        options["baseline"] = None if start is None else jnp.asarray(start)
    function, _ = METHODS[method]
    result = replace(function(model, tokens, mask, target, **options), method=method)
    if "norm" in options:
        return replace(result, norm=options["norm"])
    if method == "integrated_gradients" and steps is None:
        _warn_of_gaps(model.config, host(result.gap), host(options["tolerance"]))
    return result


def _checked_options(config: ModelConfig, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's options, given or by default; numbers that may vary as arrays.

    Raises:
        TypeError, ValueError: for options of other methods, and values that do not fit.
    """
    defaults = METHODS[method][1]
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in defaults:
            owners = [other for other, (_, own) in METHODS.items() if name in own]
            do = f"leave it out, or choose method={' or '.join(map(repr, owners))}"
            raise ValueError(expected(name, f"None with method={method!r}", value, do))
    if {"steps", "tolerance"} <= given.keys():
        do = "it says when to stop doubling them"
        raise ValueError(expected("tolerance", "None with `steps`", given["tolerance"], do))
    options = {**defaults, **given}
    for name in CHOICES.keys() & options.keys():
        checked_choice(name, options[name], CHOICES[name])
    for name in COUNTS:
        if options.get(name) is not None:
            options[name] = _checked_whole(name, options[name])
    if "seed" in options:
        options["seed"] = checked_seed(options["seed"])
    for name in ("noise", "tolerance"):
        if name in options:
            options[name] = _checked_size(name, options[name], config.acc)
    return options


def _checked_whole(name: str, value: Any) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < 1:
        must = "a positive int" + (" or None" if name == "steps" else "")
        raise ValueError(expected(name, must, value, "try 64"))
    return int(value)


def _checked_size(name: str, value: Any, dtype: Any) -> Array:
    """A number from 0 on as an array, so that another one compiles nothing."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    known = host(array)
    fits = array.shape == () and jnp.issubdtype(array.dtype, jnp.number)
    if not fits or (known is not None and not 0 <= known < np.inf):
        raise ValueError(expected(name, "a number, 0 or more", repr(value), "give one such"))
    return jnp.asarray(array, dtype)


def _singular(model: Transformer, start: Any, tokens: Array, mask: Array | None) -> bool:
    """Whether a path starts where a norm jumps, as far as is known."""
    if start is None or model.config.norm != "rmsnorm" or model.w_pos is not None:
        return False
    values = host(start) if jnp.issubdtype(start.dtype, jnp.floating) else None
    return values is not None and anywhere(~values.any(-1), tokens, mask)


def _warn_of_gaps(config: ModelConfig, gap: np.ndarray | None, tolerance: Any) -> None:
    """Names the rows that all doublings leave open."""
    if gap is None or tolerance is None or (gap <= tolerance).all():
        return
    rows = np.flatnonzero(~(gap <= tolerance))
    warnings.warn(
        f"integrated gradients with {DOUBLINGS[-1]} steps leave a gap above {tolerance:.3g} in "
        f"rows {rows[:10].tolist()} (largest {gap.max():.2g}); "
        + (
            "where tokens change their experts on the way the logit jumps, so choose another "
            "`baseline`: more steps do not help"
            if config.n_experts
            else "pass more `steps`, or another `baseline`"
        ),
        stacklevel=3,
    )
