"""Attribution patching by hand: what its tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax import Capture, Logit
from arrakis_jax.patching.attribution_patching import attribution_patching
from arrakis_jax.patching.pairs import SITES
from arrakis_jax.patching.patch_sweep import site_axis
from arrakis_jax.stream.edits import HEAD_SITES, KV_SITES, Replace
from arrakis_jax.stream.fields import UNSTACKED, lacking
from arrakis_jax.stream.padding import Padding
from tests.models import batch, close

TARGET = Logit(3, against=4)
# Experts in some layers with norms of what is written; parallel blocks; norms of the stream.
VARIANTS = (
    dict(variant="mixed", norm_placement="both"),
    dict(variant="shared_norm"),
    dict(variant="stream_after"),
)
OVER = ("layer", "position", "head", "neuron")
ALL = Capture(("embed", "resid_pre", "attn_out", "resid_mid", "mlp_out", "final", "q", "k", "v",
               "z", "pattern", "mlp_act"))  # fmt: skip


def pair_of(lengths=(5, 3), seed=0, **how):
    """Clean and corrupt prompts of the same lengths, and their mask."""
    clean, mask, _ = batch(seed, lengths=lengths, **how)
    corrupt, _, _ = batch(seed + 1, lengths=lengths, **how)
    return clean, corrupt, mask


def sites_of(m):
    missing = (*lacking(m.config), *(("mlp_act",) if m.config.n_experts else ()))
    return tuple(site for site in SITES if site not in missing)


def at(stream, site):
    return np.asarray(getattr(stream, site), np.float64)


def by_hand(site, product):
    """Sums `[L,B,...]` to cells, layer first and B last."""
    stacked = int(site not in UNSTACKED)
    axes = [stacked + site_axis(site, "position")]
    axes += [stacked + site_axis(site, "head")] if site in (*HEAD_SITES, "mlp_act") else []
    wanted = [*range(stacked), *axes, stacked]
    rest = [i for i in range(product.ndim) if i not in wanted]
    return product.transpose(*wanted, *rest).sum(tuple(range(len(wanted), product.ndim)))


@functools.partial(jax.jit, static_argnames=("site",))
def exact(m, tokens, mask, value, *, site):
    """The effect of each cell, one at a time: layer, position, head, B (1 head without heads)."""
    padding = Padding.of(tokens.shape, mask)
    n_layers = 1 if site in UNSTACKED else m.config.n_layers
    n_heads = m.config.n_kv_heads if site in KV_SITES else m.config.n_heads
    shape = (n_layers, tokens.shape[1], n_heads if site in HEAD_SITES else 1)

    def target(edits):
        logits = m(tokens, mask=mask, capture=Capture(("logits",), positions=(-1,)), edits=edits)
        return logits.logits[:, 0, 3] - logits.logits[:, 0, 4]

    def one(cell):
        layer, column, head = jnp.unravel_index(cell, shape)
        edit = Replace(
            site,
            value,
            layer=None if site in UNSTACKED else layer,
            head=head if site in HEAD_SITES else None,
            position=jnp.where(padding.real[:, column], padding.rank[:, column], 10**6),
        )
        return target((edit,)) - target(())

    found = jax.lax.map(one, jnp.arange(np.prod(shape)))
    return found.reshape(*shape, -1)


def alone_and_padded(m, tolerance, **how):
    """Of the shorter of two prompts, which has padding on both sides."""
    clean, corrupt, mask = pair_of((7, 9), side="both")
    padded = attribution_patching(m, clean, corrupt, TARGET, mask=mask, **how)
    real = mask[0]
    alone = attribution_patching(m, clean[0, real][None], corrupt[0, real][None], TARGET, **how)
    for name in ("effects", "screening"):
        for site, wanted in (getattr(alone, name) or {}).items():
            effects = np.asarray(getattr(padded, name)[site])[..., 0]
            close(effects[:, real], wanted[..., 0], tolerance, f"{name} {site}")
            assert not effects[:, ~real].any() and np.isfinite(effects).all()
