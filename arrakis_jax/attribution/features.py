"""Which input tokens caused a logit: saliency, gradient times input, integrated gradients."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.gradients import tapped_gradients, target_value
from arrakis_jax.axes import Array, Float, Int, over
from arrakis_jax.checks import Ids, Mask, Tokens, checked_choice, checked_tokens, host
from arrakis_jax.errors import expected
from arrakis_jax.forward import compiled
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.numerics import norm, ratio
from arrakis_jax.places import Places
from arrakis_jax.residuals import ABSENT, Record
from arrakis_jax.targets import Target, checked_target

METHODS = ("saliency", "grad_x_input", "integrated_gradients")
# Integrated gradients with steps=None: nodes are doubled until every row's gap is small.
DOUBLINGS = (32, 64, 128, 256, 512)
TOLERANCE = 1e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Attribution(Record):
    """The share of each input token in a logit or logit difference.

    Attributes:
        tokens: `[B,T]`, to the token embedding (without learned positions).
        layers: `[L+1,B,T]`, the same quantity at resid_pre of each layer and at final; None for
            path methods.
        target: `[B]`, the logit or logit difference itself.
        gap: `[B]`, path methods: `|delta| / sum |tokens|`.
        delta: `[B]`, path methods: `sum(tokens) - (target - target at the baseline)`.
        steps: `[B]`, path methods: the nodes used.
    """

    tokens: Float[Array, "B T"]
    layers: Float[Array, "M B T"]
    target: Float[Array, " B"]
    gap: Float[Array, " B"] = ABSENT
    delta: Float[Array, " B"] = ABSENT
    steps: Int[Array, " B"] = ABSENT


def feature_attribution(
    model: Transformer,
    input_ids: Tokens,
    target_ids: Ids | Target | Callable,
    *,
    method: str = "grad_x_input",
    against: Ids | None = None,
    position: int | Array = -1,
    mask: Mask | None = None,
    steps: int | None = None,
    baseline: Array | None = None,
    check: bool = False,
) -> Attribution:
    """Attributes a logit, or a logit difference, to the input tokens.

    With `e` the token embedding and `g` the gradient with respect to it: "saliency" is `|g|`;
    "grad_x_input" is `g . e`; "integrated_gradients" is `(e - b) .` the mean of `g` on the way
    from a baseline `b` to `e`, whose sum over tokens is `f(e) - f(b)` up to `delta`. Learned
    positions are kept on the way.

    Args:
        model: the transformer.
        input_ids: `[B,T]` token ids.
        target_ids: the token whose logit is attributed, an int or `[B]`.
        method: "saliency", "grad_x_input" or "integrated_gradients".
        against: a token whose logit is subtracted, or None.
        position: where the logit is read, counted in real tokens: an int or `[B]`.
        mask: `[B,T]`.
        steps: Gauss-Legendre nodes of integrated gradients. None doubles them from 32 to 512,
            row by row, until the row's gap is at most 1e-3, and warns naming the rows where that
            is not enough (nothing is warned inside a caller's jit: look at `gap`). In models with
            experts it may never be: where a token changes its experts on the way the logit jumps,
            which no gradient sees, and `delta` holds the jumps. Reverse-mode differentiation of
            the result needs an int.
        baseline: `[D]`, `[T,D]` or `[B,T,D]` token embeddings; None for the mean embedding. Zero
            is a bad baseline in models with RMSNorm and no learned positions: the norm makes the
            path near it all but singular.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        An Attribution in logits (saliency: logits per unit of embedding); zero at padding.

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

    Reference:
        Simonyan et al. 2014 (saliency); Sundararajan et al. 2017 (integrated gradients).
    """
    checked_choice("method", method, METHODS)
    tokens, mask = checked_tokens(model.config, input_ids, mask, check=check, name="input_ids")
    target = checked_target(
        model, tokens, target_ids, mask, against=against, position=position, name="target_ids"
    )
    if method != "integrated_gradients":
        for name, value in (("steps", steps), ("baseline", baseline)):
            if value is not None:
                do = "leave it out, or choose method='integrated_gradients'"
                raise ValueError(expected(name, f"None with method={method!r}", value, do))
        return _at_input(model, tokens, mask, target, method=method)
    if steps is not None:
        whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
        if not whole or steps < 1:
            raise ValueError(expected("steps", "a positive int or None", steps, "try 64"))
        steps = int(steps)
    baseline = _checked_baseline(model, baseline, tokens.shape)
    if steps is not None:
        return _along_path(model, tokens, mask, target, baseline, steps=steps)
    result = _along_path_doubling(model, tokens, mask, target, baseline)
    gap = host(result.gap)
    if gap is not None and (gap > TOLERANCE).any():
        rows = np.flatnonzero(gap > TOLERANCE)
        warnings.warn(
            f"integrated gradients with {DOUBLINGS[-1]} steps leave a gap above {TOLERANCE} in "
            f"rows {rows[:10].tolist()} (largest {gap.max():.2g}); "
            + (
                "where tokens change their experts on the way the logit jumps, so choose another "
                "`baseline`: more steps do not help"
                if model.config.n_experts
                else "pass more `steps`, or another `baseline`"
            ),
            stacklevel=2,
        )
    return result


def _checked_baseline(model: Transformer, baseline: Any, shape: tuple[int, ...]) -> Array | None:
    if baseline is None:
        return None
    full = (*shape, model.config.d_model)
    given = jnp.shape(baseline)
    if given not in (full, full[1:], full[2:]):
        do = "give token embeddings"
        must = f"of shape {full[2:]}, {full[1:]} or {full}"
        raise ValueError(expected("baseline", must, f"shape {given}", do))
    values = host(baseline)
    if values is not None and not np.isfinite(values).all():
        raise ValueError(expected("baseline", "finite", "NaN or infinity", "give embeddings"))
    fragile = model.config.norm == "rmsnorm" and model.w_pos is None
    if fragile and values is not None and not values.any():
        warnings.warn(
            "a zero baseline in a model with RMSNorm and no learned positions makes integrated "
            "gradients unreliable: the norm's output jumps at zero; use the mean embedding "
            "(baseline=None)",
            stacklevel=3,
        )
    return jnp.asarray(baseline, model.config.acc)


def _embeddings(
    model: Transformer, tokens: Array, mask: Array | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Token embeddings, and what is added to them (learned positions or zero)."""
    places = Places.of(tokens.shape, mask)
    real = places.real[..., None]
    e_BTD = jnp.where(real, model.embed_tokens(jnp.where(places.real, tokens, 0)), 0)
    if model.w_pos is None:
        return e_BTD, jnp.zeros_like(e_BTD)
    return e_BTD, jnp.where(real, model.embed_positions(places.position), 0)


@compiled("method")
def _at_input(model, tokens, mask, target, *, method):
    e_BTD, pos_BTD = _embeddings(model, tokens, mask)
    value, gradients, stream = tapped_gradients(
        model, e_BTD + pos_BTD, mask, target, ("embed", "resid_pre", "final"), ("resid_pre",)
    )

    def reduce(gradient: Array, x: Array) -> Array:
        return norm(gradient) if method == "saliency" else jnp.sum(gradient * x, -1)

    layers = [
        reduce(gradients["resid_pre"], stream.resid_pre),
        reduce(gradients["final"], stream.final)[None],
    ]
    return Attribution(
        tokens=reduce(gradients["embed"], e_BTD), layers=jnp.concatenate(layers), target=value
    )


@dataclass(frozen=True)
class _Path:
    """Integrated gradients of one batch: the path, and the gradient at a point of it."""

    model: Transformer
    tokens: Array
    mask: Array | None
    target: Target
    baseline: Array | None

    def setup(self) -> tuple[Array, Array, Array, Array]:
        """The path's start and way, and the target at both ends."""
        model = self.model
        e_BTD, pos_BTD = _embeddings(model, self.tokens, self.mask)
        baseline = self.baseline
        if baseline is None:
            baseline = model.mean_embedding()
        real = Places.of(self.tokens.shape, self.mask).real[..., None]
        b_BTD = jnp.where(real, over(baseline, real), 0)
        ends = [target_value(model, x + pos_BTD, self.mask, self.target)[0] for x in (b_BTD, e_BTD)]
        return b_BTD + pos_BTD, e_BTD - b_BTD, ends[0], ends[1]

    def share(self, start: Array, way: Array, alpha: Array) -> Float[Array, "B T"]:
        """`way . g` at the point `start + alpha way`."""
        x_BTD = start + alpha * way
        _, gradients, _ = tapped_gradients(self.model, x_BTD, self.mask, self.target, ("embed",))
        return jnp.sum(gradients["embed"] * way, -1)

    def result(
        self, tokens: Array, first: Array, last: Array, steps: Int[Array, " B"]
    ) -> Attribution:
        """The shares with their completeness."""
        delta = tokens.sum(-1) - (last - first)
        return Attribution(
            tokens=tokens,
            layers=ABSENT,
            target=last,
            gap=ratio(jnp.abs(delta), jnp.abs(tokens).sum(-1)),
            delta=delta,
            steps=steps,
        )


def _nodes(n: int, dtype: Any) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights on [0, 1]."""
    node, weight = np.polynomial.legendre.leggauss(n)
    return jnp.asarray((1 + node) / 2, dtype), jnp.asarray(weight / 2, dtype)


@compiled("steps")
def _along_path(model, tokens, mask, target, baseline, *, steps):
    path = _Path(model, tokens, mask, target, baseline)
    start, way, first, last = path.setup()

    def add(total: Array, node: tuple[Array, Array]) -> tuple[Array, None]:
        return total + node[1] * path.share(start, way, node[0]), None

    zero = jnp.zeros(tokens.shape, model.config.acc)
    shares, _ = jax.lax.scan(add, zero, _nodes(steps, zero.dtype))
    return path.result(shares, first, last, jnp.full(tokens.shape[:1], steps))


@compiled()
def _along_path_doubling(model, tokens, mask, target, baseline):
    path = _Path(model, tokens, mask, target, baseline)
    start, way, first, last = path.setup()
    acc = model.config.acc
    counts = jnp.array(DOUBLINGS)
    tables = [_nodes(n, acc) for n in DOUBLINGS]
    longest = DOUBLINGS[-1]
    nodes = jnp.stack([jnp.pad(node, (0, longest - node.size)) for node, _ in tables])
    weights = jnp.stack([jnp.pad(weight, (0, longest - weight.size)) for _, weight in tables])

    def again(state: tuple[Array, Attribution]) -> tuple[Array, Attribution]:
        level, held = state

        def add(i: Array, total: Array) -> Array:
            return total + weights[level, i] * path.share(start, way, nodes[level, i])

        zero = jnp.zeros(tokens.shape, acc)
        shares = jax.lax.fori_loop(0, counts[level], add, zero)
        fresh = path.result(shares, first, last, jnp.full(tokens.shape[:1], counts[level]))
        # A row that was done keeps its result, so that it does not depend on the other rows.
        done = (held.gap <= TOLERANCE) & (level > 0)

        def keep(old: Array, new: Array) -> Array:
            return jnp.where(done.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        return level + 1, jax.tree.map(keep, held, fresh)

    def unfinished(state: tuple[Array, Attribution]) -> Array:
        level, held = state
        return (level < len(DOUBLINGS)) & jnp.any(~(held.gap <= TOLERANCE) | (level == 0))

    zero_B = jnp.zeros(tokens.shape[:1], int)
    empty = path.result(jnp.zeros(tokens.shape, acc), first, last, zero_B)
    return jax.lax.while_loop(unfinished, again, (jnp.zeros((), int), empty))[1]
