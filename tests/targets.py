"""A target of every kind, and a target of the tests' own."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax import KL, Continuation, Custom, Entropy, Logit, LogProb, Prob, Target

REFERENCE = np.random.default_rng(1).normal(size=31)


def weighed(logits_BV):
    return (logits_BV * jnp.sin(jnp.arange(31))[None]).sum(-1) + logits_BV[:, 2] ** 2


# Of every kind, without what belongs to one row.
MANY = (
    Logit(3, against=1), LogProb(5, position=-2), Prob(7, position=1), Entropy(), KL(REFERENCE),
    Custom(weighed, position=0), Continuation(2),
)  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum(Target):
    """A sum of targets, the i-th times i + 1: a target of the tests' own."""

    parts: Any

    def checked(self, model, tokens, mask):
        parts = tuple(part.checked(model, tokens, mask) for part in self.parts)
        return replace(self, position=None, parts=parts)

    def positions(self, length):
        return jnp.concatenate([part.positions(length) for part in self.parts], -1)

    def value(self, model, y_BND, real_BN):
        total, start = 0, 0
        for i, part in enumerate(self.parts):
            own = slice(start, start := start + part.positions(0).shape[-1])
            total = total + (i + 1) * part.value(model, y_BND[:, own], real_BN[:, own])
        return total
