"""Attribution patching: the effects of patching every node at once, to first order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.method import refuse_beside
from arrakis_jax.attribution.residual_gradients import target_value
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Mask, Tokens, checked_choice, checked_count
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.patching.effects import PatchEffects, axes_of, checked_over
from arrakis_jax.patching.gates import Gate, arranged, closed, openings_of, with_openings
from arrakis_jax.patching.grad_drop import dropped_effects
from arrakis_jax.patching.pairs import (
    Pair,
    checked_pair,
    checked_sites,
    fields_of,
    source_values,
    values_at,
)
from arrakis_jax.patching.qk_fix import QKV_FIELDS, qk_effects
from arrakis_jax.results.record import ABSENT
from arrakis_jax.stream.fields import UNSTACKED, lacking
from arrakis_jax.stream.residuals import ResidualStream

SOFTMAX_SITES = ("q", "k")  # where "atp_star" takes softmax as it is


@dataclass(frozen=True, kw_only=True)
class AtP:
    """Attribution patching: gradient times change, for `attribution_patching(method=...)`.

    Attributes:
        steps: average the gradient at this many inputs between the runs; None for the base run's.

    Reference:
        Nanda 2023.
    """

    name: ClassVar[str] = "atp"
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            checked_count("steps", self.steps, 10**6)

    def __str__(self) -> str:
        return self.name if self.steps is None else f"atp, the mean over {self.steps} inputs"


@dataclass(frozen=True, kw_only=True)
class AtPStar:
    """AtP with softmax as it is at queries and keys, for `attribution_patching(method=...)`.

    Attributes:
        grad_drop: whether to find `screening` too, which shows effects that cancel.

    Reference:
        Kramar et al. 2024.
    """

    name: ClassVar[str] = "atp_star"
    grad_drop: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.grad_drop, bool | np.bool_):
            do = "say whether to find `screening`"
            raise TypeError(expected("grad_drop", "True or False", repr(self.grad_drop), do))

    def __str__(self) -> str:
        return self.name


PATCHING_METHODS: dict[str, type[AtP | AtPStar]] = {m.name: m for m in (AtP, AtPStar)}


def attribution_patching(
    model: Transformer,
    clean: Tokens,
    corrupt: Tokens | None,
    target: Any,
    *,
    sites: str | tuple[str, ...] | None = None,
    over: str | tuple[str, ...] | None = None,
    method: str | AtP | AtPStar = "atp",
    base: str = "clean",
    patch: str = "resample",
    steps: int | None = None,
    grad_drop: bool = False,
    mask: Mask | None = None,
    check: bool = False,
) -> PatchEffects:
    """The effects of patching each cell of every site, to first order, all at once.

    "atp": `gradient . (source - base)` of each cell, with the gradient of the target in the base
    run. This is what `patch_sweep` finds exactly, if all that follows the cell were linear. Along
    an axis that is not in `over` it is the sum. It costs one forward of the source, and one forward
    and one backward of the base, whatever the number of cells.

    A gradient misses what saturates. "atp_star" takes softmax as it is at the nodes "q" and "k":
    the change of attention probabilities is computed, and only what follows them is linear. It
    costs two attention cores more. `steps` averages gradients on the way from base to source. A
    gradient also misses effects that cancel: `grad_drop` shows them.

    Args:
        model: the transformer.
        clean: `[B,T]` token ids.
        corrupt: `[B,T]` token ids, aligned with `clean` token for token; may be None for
            patch="zero".
        target: what is measured, such as `Logit(3, against=4)`; or token ids; or a function of
            logits. A KL divergence from the base run itself has no slope there.
        sites: one or several of embed, resid_pre, attn_out, resid_mid, mlp_out, resid_post, final,
            q, k, v, pattern, z, mlp_act. None for resid_pre, attn_out, mlp_out and z, with
            "atp_star" q, k and v too.
        over: some of "layer", "position" (columns of the tokens; queries of a pattern), "head"
            (key/value head at "k" and "v") and "neuron". Each of several sites has the axes that
            it can have. None for layer, position and head, where a site has them.
        method: "atp" or "atp_star"; or `AtP(steps=...)` or `AtPStar(grad_drop=...)`, which hold
            their option themselves.
        base: the run that is patched, "clean" (noising) or "corrupt" (denoising). The other one
            is the source.
        patch: what is put in place: "resample" (the source's activation), "mean" (of the source
            over the real tokens of all rows) or "zero".
        steps: with "atp", the mean gradient at this many embedded inputs on the straight line from
            base to source (the middles of equal pieces), at two forwards each. The summed effects
            of "embed" tend to the change of the target as they grow.
        grad_drop: with "atp_star", find `screening` too, at L + 2 forwards more at most.
        mask: `[B,T]`, of both runs.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        PatchEffects, whose effects have an axis for each entry of `over`, then B, in units of the
        target; zero at padding. With several sites a dict by site. `screening` of each cell is
        `sum_l |effect with the attention and MLP outputs of layer l held fixed| / (L - 1)`
        (absolute after the sum along axes not in `over`; "embed" and "final" are in no layer, so
        all L count). It helps to find nodes, and is no estimate of an effect.

    Raises:
        TypeError, ValueError, IndexError: for tokens, a target, sites, axes or options that do not
            fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> clean = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> corrupt = encode(tokenizer, "Alice and Tom met, Alice gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> estimates = attribution_patching(
        ...     model, clean, corrupt, Logit(alice, tom), sites=("z", "mlp_out"), method="atp_star"
        ... )
        >>> estimates.effects["z"].shape, estimates.effects["mlp_out"].shape
        ((4, 11, 4, 1), (4, 11, 1))

    Reference:
        Nanda 2023, "Attribution Patching"; Kramar et al. 2024, "AtP*" (QK fix and GradDrop; the
        key fix in a form that holds in saturated rows); Hanna et al. 2024 and Mueller et al. 2025
        on averaged gradients.
    """
    pair = checked_pair(model, clean, corrupt, mask, base=base, patch=patch, check=check)
    method = _checked_method(method, steps, grad_drop, patch)
    sites = checked_sites(model.config, _default(model, method.name) if sites is None else sites)
    if over is None:
        axes = ("layer", "position", "head")
        over = tuple(axis for axis in axes if any(axes_of(site, (axis,)) for site in sites))
    over = checked_over(over, sites)
    if isinstance(method, AtPStar) and method.grad_drop:
        _check_grad_drop(model, sites, over)
    target = checked_target(model, pair.base, target, pair.mask)
    return _attribution_patching(
        model, pair, target, sites=sites, over=over, method=method, patch=patch
    )


def _default(model: Transformer, method: str) -> tuple[str, ...]:
    """The sites of a method that the model has."""
    qkv = QKV_FIELDS if method == "atp_star" else ()
    sites = ("resid_pre", "attn_out", "mlp_out", *qkv, "z")
    return tuple(site for site in sites if site not in lacking(model.config))


def _checked_method(method: Any, steps: Any, grad_drop: Any, patch: str) -> AtP | AtPStar:
    """The method, or the one of this name with these options.

    Raises:
        ValueError: for another method, and for options that do not go together.
    """
    keywords: dict[str, Any] = {} if steps is None else {"steps": steps}
    if grad_drop:
        keywords["grad_drop"] = True
    if isinstance(method, AtP | AtPStar):
        refuse_beside(method, keywords)
    else:
        checked_choice("method", method, tuple(PATCHING_METHODS))
        if steps is not None:
            checked_count("steps", steps, 10**6)
            if method != "atp":
                raise _steps_error(steps, method, patch)
        if grad_drop and method != "atp_star":
            do = "choose method='atp_star' with it"
            raise ValueError(expected("grad_drop", "False", f"True with method={method!r}", do))
        method = PATCHING_METHODS[method](**keywords)
    if isinstance(method, AtP) and method.steps is not None and patch != "resample":
        raise _steps_error(method.steps, method.name, patch)
    return method


def _steps_error(steps: int, method: str, patch: str) -> ValueError:
    do = "use method='atp' and patch='resample' with it"
    got = f"{steps} with method={method!r} and patch={patch!r}"
    return ValueError(expected("steps", "None", got, do))


def _check_grad_drop(model: Transformer, sites: tuple[str, ...], over: tuple[str, ...]) -> None:
    """Raises ValueError where GradDrop is not defined."""
    if model.config.n_layers < 2:
        do = "it needs another layer than a node's own"
        raise ValueError(expected("grad_drop", "False", "True with a model of one layer", do))
    if "layer" not in over and not set(sites) <= set(UNSTACKED):
        do = "one layer is held fixed for each layer of nodes: add 'layer'"
        raise ValueError(expected("over", "with 'layer' for grad_drop", over, do))


@compiled("sites", "over", "method", "patch")
def _attribution_patching(
    model: Transformer,
    pair: Pair,
    target: Target,
    *,
    sites: tuple[str, ...],
    over: tuple[str, ...],
    method: AtP | AtPStar,
    patch: str,
) -> PatchEffects:
    mask = pair.mask
    values, source_B = source_values(model, pair, target, sites, patch)
    x_BTD = model.embed(pair.base, mask=mask)
    star = isinstance(method, AtPStar)
    fixed = {site: values[site] for site in sites if star and site in SOFTMAX_SITES}
    gated = {site: value for site, value in values.items() if site not in fixed}
    # Queries and keys under atp_star need no gate: their effects come from the gradient at z.
    gates = closed(model, x_BTD, gated, over)
    screening = None
    if isinstance(method, AtPStar) and method.grad_drop:
        base_B, effects, screening = dropped_effects(model, x_BTD, mask, target, gates, fixed, over)
    elif isinstance(method, AtP) and method.steps is not None:
        assert pair.source is not None  # as checked
        ends = (x_BTD, model.embed(pair.source, mask=mask))
        base_B, effects = _along_line(model, ends, mask, target, gates, method.steps)
    else:
        base_B, effects, g_z, stream = _slopes(model, x_BTD, mask, target, gates, bool(fixed))
        if fixed:
            effects = effects | qk_effects(model, stream, g_z, fixed, mask)

    def shaped(by_site: dict[str, Array]) -> Any:
        by_site = {site: arranged(site, by_site[site], over) for site in sites}
        first, *more = by_site.values()
        return by_site if more else first

    return PatchEffects(
        effects=shaped(effects),
        base=base_B,
        source=source_B,
        screening=ABSENT if screening is None else shaped(screening),
        mask=mask,
        over=over,
        sites=sites,
        method=str(method),
        patch=patch,
    )


def _slopes(
    model: Transformer,
    x_BTD: Float[Array, "B T D"],
    mask: Array | None,
    target: Target,
    gates: dict[str, Gate],
    read: bool,
) -> tuple[Array, dict[str, Array], Any, ResidualStream]:
    """Each row's target, its slope at every gate, and the stream.

    With `read` also its gradient at z (else None), and the stream holds what attention reads.
    """
    config = model.config
    z = None
    if read:
        shape = (config.n_layers, *x_BTD.shape[:2], config.n_heads, config.d_head)
        z = jnp.zeros(shape, config.acc)

    # Derivatives with respect to closed gates: each is already the effect of a cell.
    def total(openings: dict[str, Array], z: Array | None) -> tuple[Array, tuple]:
        taps = with_openings(gates, openings, z)
        value_B, stream = target_value(
            model, x_BTD, mask, target, taps=taps, capture=QKV_FIELDS if read else ()
        )
        return value_B.sum(), (value_B, stream)

    gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(openings_of(gates), z)
    (slopes, g_z), (value_B, stream) = gradients, values
    return value_B, slopes, g_z, stream


def _along_line(
    model: Transformer,
    ends: tuple[Array, Array],
    mask: Array | None,
    target: Target,
    gates: dict[str, Gate],
    steps: int,
) -> tuple[Array, dict[str, Array]]:
    """Each row's target, and effects with the mean gradient between the base and the source."""
    base, source = ends
    sites = tuple(gates)
    base_B, stream = target_value(model, base, mask, target, capture=fields_of(sites))
    # The change is that between the ends, whichever input between them the gradient is taken at.
    base_values = values_at(stream, sites)
    gates = {
        site: replace(
            gate,
            source=gate.source - base_values[site],  # the change itself, and nothing subtracted
            base=jnp.zeros(() if site in UNSTACKED else model.config.n_layers, model.config.acc),
        )
        for site, gate in gates.items()
    }

    def step(total: dict[str, Array], along: Array) -> tuple[dict[str, Array], None]:
        x_BTD = base + along * (source - base)
        slopes = _slopes(model, x_BTD, mask, target, gates, False)[1]
        return jax.tree.map(jnp.add, total, slopes), None

    # The middles of equal pieces. Openings are zeros, so the sum can start with them.
    along = (jnp.arange(steps, dtype=base.dtype) + 0.5) / steps
    total, _ = jax.lax.scan(step, openings_of(gates), along)
    return base_B, {site: x / steps for site, x in total.items()}
