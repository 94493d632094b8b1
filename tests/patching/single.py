"""Runs with one edit, by which patches are defined, and the pairs that they are made on."""

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax import Logit, Replace, run
from tests.models import batch, model

TARGET = Logit(3, against=4)
LINEAR = dict(
    norm=None, norm_eps=None, activation="identity", gated=False, positions=None, rope_theta=None,
)  # fmt: skip
CAPTURE = ("logits", "embed", "z", "mlp_out", "attn_out")


def pairs(lengths=(5, 3), side="holes", seed=0):
    """Clean and corrupt prompts of the same lengths, with different garbage, and the mask."""
    clean, mask, prompts = batch(seed, lengths=lengths, side=side)
    corrupt, _, others = batch(seed + 1, lengths=lengths, side=side)
    placed = clean[:, ::-1].copy()
    for row, own, other in zip(placed, mask, others, strict=True):
        row[own] = other
    return clean, placed, mask, list(zip(prompts, others, strict=True))


def target_of(logits, mask):
    """The logit difference at each row's last real token."""
    last = [np.flatnonzero(row)[-1] for row in mask]
    rows = np.asarray(logits)[np.arange(len(last)), last]
    return rows[:, 3] - rows[:, 4]


@jax.jit
def edited(m, ids, mask, edits):
    """The logits of a run with these edits, of which one program makes many."""
    return run(m, ids, mask=mask, capture=("logits",), edits=edits).logits


def linear(**changes):
    """G8: no norms, uniform attention, nothing but products."""
    m = model(dtype="float64", **LINEAR | changes)
    m.blocks.attn.w_q[...] = jnp.zeros_like(m.blocks.attn.w_q[...])
    return m


def written(m, base, source, mask, node):
    """What a writer changes in the stream, by a run with its output replaced."""
    layer, kind, *head = node
    own, other = (run(m, t, mask=mask, capture=CAPTURE).residuals for t in (base, source))
    if kind == "embed":
        return other.embed - own.embed
    if kind == "mlp":
        return other.mlp_out[layer] - own.mlp_out[layer]
    edit = Replace("z", other.z[layer], layer=layer, head=head[0])
    after = run(m, base, mask=mask, capture=CAPTURE, edits=edit).residuals.attn_out
    return after[layer] - own.attn_out[layer]
