"""Exact activation patching of every cell: each layer, position, head or neuron by itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from arrakis_jax.attribution.chunks import in_chunks
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import Mask, Tokens, checked_count
from arrakis_jax.forward.run import compiled
from arrakis_jax.forward.targets import Target, checked_target, read_target
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.patching.effects import PatchEffects, axes_of, checked_over, real_cells
from arrakis_jax.patching.pairs import Pair, checked_pair, checked_sites, source_values
from arrakis_jax.stream.edits import KV_SITES
from arrakis_jax.stream.fields import UNSTACKED
from arrakis_jax.stream.residuals import ResidualStream

# Points of the stream that enter a block: which one, counted from the site's own layer.
ENTERING = {"resid_pre": 0, "resid_post": 1}


def patch_sweep(
    model: Transformer,
    clean: Tokens,
    corrupt: Tokens | None,
    target: Any,
    *,
    sites: str | tuple[str, ...] = "resid_pre",
    over: str | tuple[str, ...] = ("layer", "position"),
    base: str = "clean",
    patch: str = "resample",
    mask: Mask | None = None,
    cell_batch: int = 16,
    check: bool = False,
) -> PatchEffects:
    """The effect of patching each cell of a site, exactly: `target(patched) - target(base)`.

    A cell is one index along each axis of `over`; along the others everything is patched at once
    (without "layer": in all layers). Patching a run into itself changes nothing, to rounding.

    For each cell only the blocks from its own layer on are run, `(L + 1) / 2L` of a forward on
    average, and only the target's logits are read. With "position" in `over`, earlier positions
    keep their keys and values: in four steps, 5/8 of all positions are run. Beyond the runs of the
    pair, the blocks of `cell_batch` cells take temporary memory. One program serves all tokens and
    targets of a kind.

    Args:
        model: the transformer.
        clean: `[B,T]` token ids.
        corrupt: `[B,T]` token ids, aligned with `clean` token for token; may be None for
            patch="zero".
        target: what is measured, such as `Logit(3, against=4)`; or token ids; or a function of
            logits.
        sites: one or several of embed, resid_pre, attn_out, resid_mid, mlp_out, resid_post, final,
            q, k, v, pattern, z, mlp_act, each swept by itself.
        over: some of "layer", "position" (columns of the tokens; queries of a pattern), "head"
            (key/value head at "k" and "v") and "neuron". Each of several sites has the axes that
            it can have.
        base: the run that is patched, "clean" (noising) or "corrupt" (denoising). The other one
            is the source.
        patch: what is put in place: "resample" (the source's activation), "mean" (of the source
            over the real tokens of all rows) or "zero".
        mask: `[B,T]`, of both runs.
        cell_batch: how many cells of a layer are run at once.
        check: also check the values of arrays that are on an accelerator.

    Returns:
        PatchEffects, whose effects have an axis for each entry of `over`, then B, in units of the
        target; zero at padding. With several sites a dict by site.

    Raises:
        TypeError, ValueError, IndexError: for tokens, a target, sites or axes that do not fit.

    Example:
        >>> model, tokenizer = demo_model()
        >>> clean = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> corrupt = encode(tokenizer, "Alice and Tom met, Alice gave a book to")
        >>> alice, tom = (token_id(tokenizer, name) for name in (" Alice", " Tom"))
        >>> sweep = patch_sweep(
        ...     model, clean, corrupt, Logit(alice, tom), sites="z", over=("layer", "head")
        ... )
        >>> sweep.effects.shape, str(sweep.labels[5])
        ((4, 4, 1), 'L1 z head 1')

    Reference:
        Activation patching: Vig et al. 2020; Meng et al. 2022, "Locating and Editing Factual
        Associations in GPT" (causal tracing); Zhang & Nanda 2024 on its variants.
    """
    pair = checked_pair(model, clean, corrupt, mask, base=base, patch=patch, check=check)
    sites = checked_sites(model.config, sites)
    over = checked_over(over, sites)
    checked_count("cell_batch", cell_batch, 10**6)
    target = checked_target(model, pair.base, target, pair.mask)
    return _patch_sweep(
        model, pair, target, sites=sites, over=over, patch=patch, cell_batch=cell_batch
    )


@compiled("sites", "over", "patch", "cell_batch")
def _patch_sweep(
    model: Transformer,
    pair: Pair,
    target: Target,
    *,
    sites: tuple[str, ...],
    over: tuple[str, ...],
    patch: str,
    cell_batch: int,
) -> PatchEffects:
    mask = pair.mask
    # Keys and values of earlier columns are reused where positions are cells of their own.
    fields = ("resid_pre", "final", *(("k", "v") if "position" in over else ()))
    base = model(pair.base, mask=mask, capture=fields).residuals
    base_B = read_target(model, base.final, mask, target)
    values, source_B = source_values(model, pair, target, sites, patch)
    effects = {}
    for site, value in values.items():
        axes = axes_of(site, over)
        sweep = _SiteSweep.of(
            model, base, mask, target, site=site, over=axes, cell_batch=cell_batch
        )
        patched = sweep.targets(value, axes)
        change = patched - base_B.reshape(*(1,) * (patched.ndim - 1), -1)
        effects[site] = at_real(change, base.mask, axes)
    first, *more = sites
    return PatchEffects(
        effects=effects if more else effects[first],
        base=base_B,
        source=source_B,
        mask=mask,
        over=over,
        sites=sites,
        patch=patch,
    )


def at_real(effects: Float[Array, "... B"], real_BT: Array, over: tuple[str, ...]) -> Array:
    """Effects with these axes and B, zero at padding."""
    if "position" not in over:
        return effects
    return jnp.where(real_cells(real_BT, over), effects, 0)


@dataclass(frozen=True)
class _SiteSweep:
    """The target with each cell of one site patched.

    Attributes:
        base: the run that is patched, with its points of the stream (and keys and values, if
            positions are cells of their own).
        points_PBTD: these points, the final stream among them.
        axes: the axes of a layer's cells, and `shape` how many cells it has along each.
    """

    model: Transformer
    base: ResidualStream
    points_PBTD: Float[Array, "P B T D"]
    mask: Array | None
    target: Target
    site: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    cell_batch: int

    @classmethod
    def of(
        cls,
        model: Transformer,
        base: ResidualStream,
        mask: Array | None,
        target: Target,
        *,
        site: str,
        over: tuple[str, ...],
        cell_batch: int,
    ) -> _SiteSweep:
        """The sweep over the cells that a site has along these axes."""
        config = model.config
        counts = {
            "position": base.mask.shape[1],
            "head": config.n_kv_heads if site in KV_SITES else config.n_heads,
            "neuron": config.d_mlp,
        }
        axes = tuple(axis for axis in over if axis != "layer")
        shape = tuple(counts[axis] for axis in axes)
        points_PBTD = jnp.concatenate([base.resid_pre, base.final[None]])
        return cls(model, base, points_PBTD, mask, target, site, axes, shape, cell_batch)

    def targets(self, value: Array, over: tuple[str, ...]) -> Float[Array, "... B"]:
        """The target of each cell: an axis for each entry of `over`, then B.

        `value`, put in place, is `[L,...]` (for embed and final without L), or broadcasts to it.
        """
        if "layer" not in over:
            return self._steps(None, value)
        # A map and no vmap over layers: a layer is where the run starts, and that skips blocks.
        layers = jnp.arange(self.model.config.n_layers)
        targets = jax.lax.map(lambda xs: self._steps(*xs), (layers, value))
        return jnp.moveaxis(targets, 0, over.index("layer"))

    def _steps(self, layer: Array | None, value: Array) -> Float[Array, "... B"]:
        """The cells of one layer (or of all layers at once, if None), in steps of columns."""
        if "position" not in self.axes:
            return self._cells(layer, value, 0, self.shape).reshape(*self.shape, -1)
        at, targets = self.axes.index("position"), []
        axis = site_axis(self.site, "position") + (layer is None and self.site not in UNSTACKED)
        for first, last in column_steps(self.shape[at]):
            later = from_column(value, axis, first)
            shape = (*self.shape[:at], last - first, *self.shape[at + 1 :])
            targets.append(self._cells(layer, later, first, shape).reshape(*shape, -1))
        return jnp.concatenate(targets, at)

    def _cells(
        self, layer: Array | None, value: Array, first: int, shape: tuple[int, ...]
    ) -> Float[Array, "N B"]:
        """Cells of this shape, whose positions start with the column `first`."""
        base, site = self.base, self.site
        # A patched stream point enters the first block that is run; other sites need an edit.
        enters = site in UNSTACKED or (layer is not None and site in ENTERING)
        start: Any = 0 if layer is None else layer + ENTERING.get(site, 0)
        start = self.model.config.n_layers if site == "final" else start
        x_BTD = self.points_PBTD[start][:, first:]
        before = (base.k[:, :, :first], base.v[:, :, :first]) if first else None
        rest = partial(self.model.blocks_from, start=start, mask=self.mask, before=before)

        def patched(cell: Array) -> Float[Array, " B"]:
            index = dict(zip(self.axes, jnp.unravel_index(cell, shape), strict=True))

            def edit(name: str, at: Array, x: Array) -> Array:
                if name != site:
                    return x
                if layer is None:
                    return put(x, site, index, jax.lax.dynamic_index_in_dim(value, at, 0, False))
                # Later layers meet the edit too; it changes the cell's own layer alone.
                return jnp.where(at == layer, put(x, site, index, value), x)

            final = rest(put(x_BTD, site, index, value)) if enters else rest(x_BTD, edits=(edit,))
            # Columns before the first cell are the base run's.
            final = jnp.concatenate([base.final[:, :first], final], 1)
            return read_target(self.model, final, self.mask, self.target)

        return in_chunks(patched, prod(shape), self.cell_batch)


def column_steps(n: int) -> list[tuple[int, int]]:
    """Begin and end of four steps of columns, or of fewer steps of at least 8 columns."""
    size = max(8, -(-n // 4))
    return [(first, min(first + size, n)) for first in range(0, n, size)]


def from_column(value: Array, axis: int, first: int) -> Array:
    """Without the columns before `first`, if the value differs between columns."""
    if value.ndim <= axis or value.shape[axis] == 1:
        return value
    return jax.lax.slice_in_dim(value, first, None, axis=axis)


def put(x: Array, site: str, index: dict[str, Array], value: Array) -> Array:
    """A site's value with another in place at these indices of its axes."""
    # A comparison of indices and no scatter: it serves any mix of axes, and vmaps over cells.
    chosen: Any = True
    for axis, i in index.items():
        at = site_axis(site, axis)
        chosen &= jax.lax.broadcasted_iota(i.dtype, x.shape, at) == i
    return jnp.where(chosen, value.astype(x.dtype), x)


def site_axis(site: str, axis: str) -> int:
    """The axis of a site's value, without L, along which its positions, heads or neurons are."""
    if site == "pattern":
        return {"head": 1, "position": 2}[axis]
    return 1 if axis == "position" else 2
