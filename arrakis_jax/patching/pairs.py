"""Pairs of runs: the base, which is patched, and the source, whose activations are put in place."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array
from arrakis_jax.core.checks import checked_choice, checked_tokens, host, tokens_and_mask
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.prompts import PADDING_ID
from arrakis_jax.forward.targets import Target, read_target
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import ABSENT
from arrakis_jax.stream.fields import UNSTACKED, lacking
from arrakis_jax.stream.residuals import ResidualStream

PATCHES = ("resample", "mean", "zero")
PER_HEAD = ("q", "k", "v", "z", "pattern")
SITES = ("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "final",
         "q", "k", "v", "pattern", "z", "mlp_act")  # fmt: skip


class Pair(NamedTuple):
    """Checked tokens of both runs and their common mask; no source for zero ablation alone."""

    base: Array
    source: Array | None
    mask: Array | None


def checked_pair(
    model: Transformer,
    clean: Any,
    corrupt: Any,
    mask: Any,
    *,
    base: str = "clean",
    patch: str = "resample",
    check: bool = False,
) -> Pair:
    """The tokens of a batch of pairs, of one shape and mask, as base and source.

    Raises:
        TypeError, ValueError: for tokens or a mask that do not fit, or pairs of unequal length.
    """
    checked_choice("base", base, ("clean", "corrupt"))
    checked_choice("patch", patch, PATCHES)
    clean, mask = tokens_and_mask(clean, mask)
    corrupt, other = tokens_and_mask(corrupt, None)
    if other is not None and mask is None:  # the clean prompts are ids alone, of no padding
        mask = np.ones(np.shape(clean), bool)
    clean, real = checked_tokens(model.config, clean, mask, check=check, name="clean")
    if corrupt is None:
        if patch == "zero" and base == "clean":
            return Pair(clean, None, real)
        do = "give the prompts that patches come from"
        raise TypeError(expected("corrupt", "token ids `[B,T]`", "None", do))
    try:
        shape = np.shape(corrupt)
    except ValueError:  # ragged rows: checked_tokens below says so
        shape = clean.shape
    if len(shape) == 2 and shape != clean.shape:
        do = "make pairs of equal length, token for token"
        must = f"of clean's shape {clean.shape}"
        raise ValueError(expected("corrupt", must, f"shape {shape}", do))
    _check_lengths(clean, corrupt, mask, other)
    corrupt, _ = checked_tokens(model.config, corrupt, mask, check=check, name="corrupt")
    pair = (clean, corrupt) if base == "clean" else (corrupt, clean)
    return Pair(*pair, real)


def _check_lengths(clean: Any, corrupt: Any, mask: Any, other: Any) -> None:
    """Raises ValueError if a corrupt prompt's real tokens are not where its clean one's are."""
    if mask is None:
        return
    real, ids, clean_ids = host(mask), host(corrupt), host(clean)
    if real is None or ids is None or clean_ids is None:
        return
    real = real.astype(bool)
    if other is None:
        # Bare ids show their padding only if it is marked, as `encode` does. Else any id may be
        # padding, and the common mask is believed.
        marked = not real.all() and (clean_ids[~real] == PADDING_ID).all()
        if not marked and not (ids == PADDING_ID).any():
            return
        other = ids != PADDING_ID if marked else (ids != PADDING_ID) | ~real
    others = np.asarray(other).astype(bool)
    unequal = np.flatnonzero((real != others).any(-1))
    if unequal.size:
        b = unequal[0]
        got = f"{others[b].sum()} tokens where clean has {real[b].sum()}, in row {b}"
        if others[b].sum() == real[b].sum():
            got = f"padding on another side than clean, in row {b}"
        do = "patches go from token to token: make pairs of equal length, padded alike"
        raise ValueError(expected("corrupt", "of each clean prompt's length", got, do))


def as_names(argument: str, names: Any) -> tuple[str, ...]:
    """One name or several, as a tuple; TypeError for anything else."""
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, Iterable):
        do = "name one, or several in a tuple"
        raise TypeError(expected(argument, "a name or names", repr(names), do))
    return tuple(names)


def checked_sites(config: ModelConfig, sites: Any, *, known: tuple[str, ...] = SITES) -> tuple:
    """Sites as a tuple of names that the model has.

    Raises:
        TypeError, ValueError: for sites that are unknown, twice there, or not the model's.
    """
    names = as_names("sites", sites)
    absent = lacking(config)
    present = tuple(s for s in known if s not in absent)
    if config.n_experts:
        # Two runs may go to different experts, whose neurons do not correspond.
        present = tuple(s for s in present if s != "mlp_act")
    if not names or len(set(names)) < len(names):
        raise ValueError(expected("sites", "different names, at least one", names, "name them"))
    for name in names:
        if name not in present:
            do = "choose one of them"
            raise ValueError(expected("sites", f"made of {present}", repr(name), do))
    return names


def fields_of(sites: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of a stream from which the values at these sites are read."""
    # resid_post is not captured: it is the next layer's resid_pre, or final.
    fields = {
        f: None for s in sites for f in (("resid_pre", "final") if s == "resid_post" else (s,))
    }
    return tuple(fields)  # a dict's keys: each once, in order


def values_at(
    stream: ResidualStream, sites: tuple[str, ...], patch: str = "resample"
) -> dict[str, Array]:
    """What is put in place at each site: `[L,B,T,...]`, or for embed and final without L.

    Means are over the real tokens of all examples, and broadcast.
    """
    values: dict[str, Any] = {site: getattr(stream, site) for site in sites}
    if patch == "resample":
        return values
    return {site: _mean(stream, site, value) for site, value in values.items()}


def source_values(
    model: Transformer, pair: Pair, target: Target, sites: tuple[str, ...], patch: str
) -> tuple[dict[str, Array], Array]:
    """What is put in place at each site, and the source run's target if its values are.

    Values are `[L,...]` (for embed and final without L), or broadcast to it.
    """
    if patch == "zero":
        n_layers, acc = model.config.n_layers, model.config.acc
        shapes = {site: () if site in UNSTACKED else (n_layers,) for site in sites}
        return {site: jnp.zeros(shape, acc) for site, shape in shapes.items()}, ABSENT
    assert pair.source is not None  # as checked
    fields = tuple(dict.fromkeys((*fields_of(sites), "final")))
    stream = model(pair.source, mask=pair.mask, capture=fields).residuals
    values = values_at(stream, sites, patch)
    if patch == "mean":
        return values, ABSENT  # a mean over rows is no run, and has no target
    return values, read_target(model, stream.final, pair.mask, target)


def _mean(stream: ResidualStream, site: str, value: Array) -> Array:
    if site == "pattern":
        do = "a mean pattern of rows of unequal length is none; patch q, k or z"
        raise ValueError(expected("sites", "without 'pattern' with patch='mean'", site, do))
    axes = (0, 1) if site in UNSTACKED else (1, 2)
    # Values are zero at padding, so a sum over all tokens is one over the real ones.
    mean = value.sum(axes, keepdims=True) / stream.mask.sum()
    return jnp.broadcast_to(mean, value.shape)
