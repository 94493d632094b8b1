"""Prompts and others of the same lengths, between which edges are patched."""

from arrakis_jax import Logit
from tests.models import batch

TARGET = Logit(3, against=4)
LENGTHS = (5, 3)


def pairs(lengths=LENGTHS, side="left"):
    """Prompts and others of the same lengths, with other garbage at padding."""
    tokens, mask, prompts = batch(lengths=lengths, side=side)
    others = [(7 * prompt + 3) % 31 for prompt in prompts]
    corrupt = tokens - 1
    for row, real, other in zip(corrupt, mask, others, strict=True):
        row[real] = other
    return tokens, corrupt, mask, prompts, others
