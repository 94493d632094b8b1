"""Which input tokens caused a target: gradients, integrated gradients and perturbations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from arrakis_jax.attribution.integrated_gradients import IntegratedGradients
from arrakis_jax.attribution.method import FeatureMethod, option_names, refuse_beside
from arrakis_jax.attribution.perturb import Occlusion, ValueZeroing
from arrakis_jax.attribution.result import Attribution
from arrakis_jax.attribution.saliency import GradTimesInput, Saliency, SmoothGrad
from arrakis_jax.core.axes import Array
from arrakis_jax.core.checks import Ids, Mask, Tokens, checked_choice, checked_tokens
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.targets import Target, checked_target
from arrakis_jax.nn.transformer import Transformer

FEATURE_METHODS: dict[str, type[FeatureMethod]] = {
    method.name: method
    for method in (
        Saliency, GradTimesInput, SmoothGrad, IntegratedGradients, Occlusion, ValueZeroing,
    )
}  # fmt: skip


def feature_attribution(
    model: Transformer,
    input_ids: Tokens,
    target_ids: Ids | Target | Callable,
    *,
    method: str | FeatureMethod = "grad_x_input",
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
    - "value_zeroing": `f(e) - f(e with this token's values zero in every layer)`: no token reads
      it by attention, not even itself.

    Each method is also a value that holds its options: `method=IntegratedGradients(steps=50)` is
    `method="integrated_gradients", steps=50`. An option that a method does not have must be left
    out.

    Args:
        model: the transformer.
        input_ids: `[B,T]` token ids.
        target_ids: the token whose logit is attributed, an int or `[B]`; or any target, such as
            `LogProb(3)`, or a function of logits.
        method: one of the above; or a `Saliency`, `GradTimesInput`, `SmoothGrad`,
            `IntegratedGradients`, `Occlusion` or `ValueZeroing`, which holds all options itself.
        against: a token whose logit is subtracted, or None.
        position: where the logit is read, counted in real tokens: an int or `[B]`.
        mask: `[B,T]`.
        norm: of saliency and smooth_grad: "l2" (default), "l1", or "signed", which is `g . e`.
        baseline: of integrated_gradients and occlusion: "mean" (default), the mean embedding;
            "zero"; a neutral token's id; `[B,T]` token ids, such as a counterfactual prompt; or
            `[D]`, `[T,D]` or `[B,T,D]` token embeddings. In models with RMSNorm and no learned
            positions a path must not start at zero: the norm's output jumps there.
        rule: of integrated_gradients, the quadrature: "gauss_legendre" (default), "left", "right",
            "midpoint" or "trapezoid".
        steps: of integrated_gradients, the rule's nodes (of "trapezoid" the intervals). None
            doubles them from 32 to 512, row by row, until the row's gap is at most `tolerance`,
            and warns of the rows where 512 are not enough (not inside a caller's jit: look at
            `gap`). In models with experts they may never be: the logit jumps where a token changes
            its experts on the way. No gradient sees the jumps, and `delta` holds them.
            Reverse-mode differentiation of the result needs an int.
        tolerance: of integrated_gradients without `steps`: the largest gap, 1e-3 by default.
        samples: of smooth_grad, how many gradients are averaged (50 by default).
        noise: of smooth_grad, the noise's standard deviation, as a fraction of the embedding
            table's (0.15 by default).
        seed: of smooth_grad (0 by default). Noise depends on it, the sample and the token's
            position counted in real tokens, and is the same in every row.
        step_batch: how many steps, samples or positions are run at once at most (1 by default).
            More need more memory, and less time where a device is not full.
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
        >>> shares = feature_attribution(
        ...     model, tokens, alice, against=tom, mask=mask, method="integrated_gradients"
        ... )
        >>> shares.tokens.shape, bool(shares.gap.max() <= 1e-3)
        ((1, 11), True)
        >>> shares.to_table(tokenizer)["token"][1]
        ' Alice'

    Reference:
        Simonyan et al. 2014 (saliency); Smilkov et al. 2017 (SmoothGrad); Sundararajan et al. 2017
        (integrated gradients); Zeiler & Fergus 2014 (occlusion); Mohebbi et al. 2023, who zero
        values and measure the change of representations; here it is the change of a target.
    """
    keywords = dict(
        norm=norm, baseline=baseline, rule=rule, steps=steps, tolerance=tolerance,
        samples=samples, noise=noise, seed=seed, step_batch=step_batch,
    )  # fmt: skip
    keywords = {name: value for name, value in keywords.items() if value is not None}
    # One implementation: a name with keywords becomes the value that it stands for.
    if isinstance(method, FeatureMethod):
        refuse_beside(method, keywords)
    else:
        method = _named_method(method, keywords)
    tokens, mask = checked_tokens(model.config, input_ids, mask, check=check, name="input_ids")
    target = checked_target(
        model, tokens, target_ids, mask, against=against, position=position, name="target_ids"
    )
    result = method.attribute(model, tokens, mask, target, check=check)
    return replace(result, method=method.name)


def _named_method(name: str, options: dict[str, Any]) -> FeatureMethod:
    """The method of this name with these options.

    Raises:
        ValueError: for another name, options of other methods, and values that do not fit.
    """
    checked_choice("method", name, tuple(FEATURE_METHODS))
    names = {other: option_names(method) for other, method in FEATURE_METHODS.items()}
    for option, value in options.items():
        if option not in names[name]:
            owners = [other for other, options_of in names.items() if option in options_of]
            do = f"leave it out, or choose method={' or '.join(map(repr, owners))}"
            raise ValueError(expected(option, f"None with method={name!r}", value, do))
    return FEATURE_METHODS[name](**options)
