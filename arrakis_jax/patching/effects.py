"""The effects of patches: a number for each cell and example, with their labels and meaning."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.checks import checked_choice, checked_count
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.patching.pairs import PER_HEAD, as_names
from arrakis_jax.results.labels import LazyLabels
from arrakis_jax.results.ranking import Top, top
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.results.table import Table
from arrakis_jax.stream.fields import UNSTACKED

AXES = ("layer", "position", "head", "neuron")


class Cell(NamedTuple):
    """What was patched: a site, and an index along each axis; None where all indices were.

    Attributes:
        site: the name of the site.
        layer: the layer.
        position: the column of `tokens`.
        head: the head (key/value head at "k" and "v").
        neuron: the neuron of `mlp_act`.
    """

    site: str
    layer: int | None = None
    position: int | None = None
    head: int | None = None
    neuron: int | None = None

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f"L{self.layer}"]
        parts.append(self.site)
        parts += [f"{n} {i}" for n in ("head", "neuron") if (i := getattr(self, n)) is not None]
        return " ".join(parts) + ("" if self.position is None else f" @ {self.position}")


@dataclass(frozen=True)
class Cells(LazyLabels[Cell]):
    """The cells of a sweep, site after site, in the order of the effects' axes.

    A cell is made when it is asked for: a sweep over neurons has millions.

    Attributes:
        over: the axes, such as ("layer", "position").
        shapes: for each site, its name and how many cells it has along each axis.
    """

    over: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    def __repr__(self) -> str:
        named = (f"{site} {' x '.join(map(str, shape)) or 1}" for site, shape in self.shapes)
        return f"Cells({len(self)} cells over {self.over}: {', '.join(named)})"

    def __len__(self) -> int:
        return sum(prod(shape) for _, shape in self.shapes)

    def _label(self, i: int) -> Cell:
        # Sites have different shapes, so their cells are counted off one site after another.
        for site, shape in self.shapes:
            if i < prod(shape):
                indices = np.unravel_index(i, shape) if shape else ()
                axes = axes_of(site, self.over)
                return Cell(site, **dict(zip(axes, map(int, indices), strict=True)))
            i -= prod(shape)
        raise AssertionError("cells do not cover their own length")


class MeanEffects(NamedTuple):
    """Means over examples and the ends of a bootstrap interval, shaped as effects without B."""

    mean: Any
    low: Any
    high: Any


class Effects(Record):
    """The base of results with an effect for each of C labels and each example.

    Attributes:
        effects: `[...,B]`.
        labels: what was patched for each of the C effects, in the order of `terms`.
    """

    effects: Any
    labels: Any

    @property
    def terms(self) -> Float[Array, "C B"]:
        """All effects as `[C,B]`."""
        return self.effects.reshape(-1, self.effects.shape[-1])

    def top(self, k: int) -> Top:
        """The k effects of largest absolute value of each example, `[k,B]`."""
        return top(self.terms, k)

    def mean(self, *, interval: float = 0.95, draws: int = 1000, seed: int = 0) -> MeanEffects:
        """The mean over examples, and a percentile bootstrap interval of it.

        Args:
            interval: the share of bootstrap means inside.
            draws: how many times the examples are drawn again, with replacement.
            seed: of these draws.
        """
        return bootstrap(self.effects, interval=interval, draws=draws, seed=seed)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class PatchEffects(Effects):
    """What patches do to a target, for each example: `effect = target(patched) - target(base)`.

    Attributes:
        effects: one axis for each entry of `over`, in that order, then B; zero at padding. With
            several sites a dict of such arrays, by site, each with the axes that its site has.
        base: `[B]`, the target of the run that is patched.
        source: `[B]`, the target of the run that patches come from; None for "zero" and "mean".
        over: the axes: "layer", "position" (columns of `tokens`), "head", "neuron".
        method: how the effects were found: "exact", or the name of the approximation.
        patch: what was put in place: "resample" (of the source), "mean" or "zero".
        screening: shaped as `effects`, magnitudes that also show nodes whose effects cancel (see
            `attribution_patching`); None unless asked for.
        mask: `[B,T]`, True at real tokens; None when all are.
    """

    effects: Any
    base: Float[Array, " B"]
    source: Float[Array, " B"] = ABSENT
    screening: Any = ABSENT
    mask: Bool[Array, "B T"] | None = ABSENT
    over: tuple[str, ...] = field(metadata={"static": True})
    sites: tuple[str, ...] = field(metadata={"static": True})
    method: str = field(default="exact", metadata={"static": True})
    patch: str = field(default="resample", metadata={"static": True})

    @property
    def meaning(self) -> str:
        """What the numbers are, in a sentence."""
        put = {
            "resample": "the source run's activation",
            "mean": "the mean of the source run's activations over its real tokens",
            "zero": "zero",
        }[self.patch]
        put = f"target with {put} in place of the base run's, minus the base run's target"
        return f"{put}{'' if self.method == 'exact' else f', estimated by {self.method}'}"

    @property
    def by_site(self) -> dict[str, Array]:
        """The effects of each site."""
        if not isinstance(self.effects, dict):
            return {self.sites[0]: self.effects}
        return {site: self.effects[site] for site in self.sites}  # jit sorts a dict's keys

    @property
    def labels(self) -> Cells:
        """What was patched, in the order of `terms`."""
        return Cells(self.over, tuple((s, x.shape[:-1]) for s, x in self.by_site.items()))

    @property
    def terms(self) -> Float[Array, "C B"]:
        """All effects as `[C,B]`."""
        return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in self.by_site.values()])

    def mean(self, *, interval: float = 0.95, draws: int = 1000, seed: int = 0) -> MeanEffects:
        """The mean over examples, and a percentile bootstrap interval of it; by site as effects.

        At a position it is the mean over the examples that have a token there; NaN if none has.

        Args:
            interval: the share of bootstrap means inside.
            draws: how many times the examples are drawn again, with replacement.
            seed: of these draws.
        """
        means = {
            site: bootstrap(x, there=self._there(site), interval=interval, draws=draws, seed=seed)
            for site, x in self.by_site.items()
        }
        if not isinstance(self.effects, dict):
            return means[self.sites[0]]
        # A dict by site for the mean and for each end, instead of three values by site.
        return MeanEffects(*({site: x[i] for site, x in means.items()} for i in range(3)))

    def _there(self, site: str) -> Array | None:
        """Which effects of a site are of real tokens, shaped as they are; None if all are."""
        axes, effects = axes_of(site, self.over), self.by_site[site]
        if self.mask is None or "position" not in axes:
            return None
        return jnp.broadcast_to(real_cells(self.mask, axes), effects.shape)

    def to_table(self, k: int | None = None) -> Table:
        """A row for each cell and example, or for the k largest of each example.

        Columns: cell, site, one for each axis of `over`, row, effect.
        """
        cells = self.labels

        def rows() -> Iterator[tuple]:
            for i, row, value in effect_rows(self.terms, k):
                cell = cells[i]
                where = (getattr(cell, axis) for axis in self.over)
                yield (str(cell), cell.site, *where, row, value)

        return Table.of_rows(("cell", "site", *self.over, "row", "effect"), rows())


def effect_rows(
    terms: Float[Array, "C B"], k: int | None, there: Any = None
) -> Iterator[tuple[int, int, float]]:
    """Each term's number, its example and its value, example after example.

    Or the k largest of each example, and with `there [C]` only the terms that are there.
    """
    every = np.arange(terms.shape[0]) if there is None else np.flatnonzero(there)
    index = None if k is None else np.asarray(top(terms, k, among=there, most=every.size).index)
    values = np.asarray(terms)  # once: an array's own indexing dispatches for each entry
    for row in range(values.shape[1]):
        for i in every if index is None else index[:, row]:
            yield int(i), row, float(values[i, row])


def bootstrap(
    values: Float[Array, "... B"],
    *,
    there: Bool[Array, "... B"] | None = None,
    interval: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> MeanEffects:
    """The mean over the last axis with a percentile bootstrap interval.

    It is over the values that are `there`, of the same shape; NaN where none is.
    """
    if not 0 < interval < 1:
        raise ValueError(expected("interval", "in (0, 1)", interval, "0.95 is usual"))
    checked_count("draws", draws, 10**6)
    n = values.shape[-1]
    # A draw with replacement is how often each example comes, so a mean is a weighted sum.
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    weight = jnp.asarray(drawn / n, values.dtype)
    tail = jnp.array([50 * (1 - interval), 50 * (1 + interval)])

    def ends(rows: tuple[Array, Array]) -> Float[Array, " 2"]:
        total, count = (contract("NB,B->N", weight, row_B) for row_B in rows)
        # A draw without any value that is there has no mean, and is left out.
        return jnp.nanpercentile(jnp.where(count > 0, total / count, jnp.nan), tail)

    real = jnp.ones_like(values) if there is None else jnp.where(there, 1, 0).astype(values.dtype)
    values = values * real
    # In batches, since each row needs `draws` numbers of memory.
    ends_C2 = jax.lax.map(ends, (values.reshape(-1, n), real.reshape(-1, n)), batch_size=4096)
    low, high = jnp.moveaxis(ends_C2.reshape(*values.shape[:-1], 2), -1, 0)
    return MeanEffects(values.sum(-1) / real.sum(-1), low, high)


def real_cells(real_BT: Bool[Array, "B T"], axes: tuple[str, ...]) -> Bool[Array, "... B"]:
    """The mask as `[T,B]` among the axes of effects, wherever "position" is."""
    shape = [real_BT.shape[1] if axis == "position" else 1 for axis in axes]
    return real_BT.T.reshape(*shape, -1)


def axes_of(site: str, over: tuple[str, ...]) -> tuple[str, ...]:
    """The axes among `over` that a site's cells have."""
    has = {
        "layer": site not in UNSTACKED,
        "position": True,
        "head": site in PER_HEAD,
        "neuron": site == "mlp_act",
    }
    return tuple(axis for axis in over if has[axis])


def checked_over(over: Any, sites: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of a sweep; each must be an axis of at least one of the sites.

    Raises:
        TypeError, ValueError: for axes that are unknown, twice there, or not the sites'.
    """
    over = as_names("over", over)
    sites_named = f"site {sites[0]!r}" if len(sites) == 1 else f"one of {sites}"
    for axis in over:
        checked_choice("over", axis, AXES)
        if over.count(axis) > 1:
            raise ValueError(expected("over", "made of different axes", over, "name each once"))
        if not any(axes_of(site, (axis,)) for site in sites):
            do = "leave that axis out, or choose another site"
            raise ValueError(expected("over", f"axes of {sites_named}", repr(axis), do))
    return over
