"""The result of an input attribution: a number for each token, and its meaning."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.core.checks import checked_count
from arrakis_jax.results.record import ABSENT, Record
from arrakis_jax.results.table import Table
from arrakis_jax.text import continuation

GRADIENT_NORMS = {
    "l2": "the Euclidean norm of",
    "l1": "the sum of the absolute entries of",
    "signed": "the product of the token's embedding and",
}
_GRADIENT = "the target's gradient with respect to the token's embedding"
MEANINGS = {
    "saliency": f"{{norm}} {_GRADIENT}",
    "grad_x_input": f"{GRADIENT_NORMS['signed']} {_GRADIENT}",
    "smooth_grad": f"{{norm}} {_GRADIENT}, averaged over embeddings with noise",
    "integrated_gradients": "the token's share in the target minus the target at the baseline",
    "occlusion": "the target minus the target with the baseline in place of the token's embedding",
    "value_zeroing": "the target minus the target with the token's values zero in every layer",
}


class TopShares(NamedTuple):
    """The largest shares by absolute value: `value [k,B]`, and `index [k,B]`, their columns."""

    value: Array
    index: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Attribution(Record):
    """How much each input token contributes to a target, in the target's units; zero at padding.

    Attributes:
        tokens: `[B,T]`, of the token embedding (without learned positions).
        layers: `[L+1,B,T]`, with saliency and gradient times input: the same quantity at resid_pre
            of each layer and at final; else None.
        target: `[B]`, the target itself.
        gap: `[B]`, with integrated gradients: `|delta| / sum |tokens|`.
        delta: `[B]`, with integrated gradients: `sum(tokens) - (target - target at the baseline)`.
        steps: `[B]`, with integrated gradients: the steps taken.
        input_ids: `[B,T]`, the token ids, 0 at padding.
        mask: `[B,T]`, True at real tokens.
        method: which method.
        norm: with saliency and SmoothGrad, how a gradient became a number; else None.
    """

    tokens: Float[Array, "B T"]
    layers: Float[Array, "M B T"] = ABSENT
    target: Float[Array, " B"]
    gap: Float[Array, " B"] = ABSENT
    delta: Float[Array, " B"] = ABSENT
    steps: Int[Array, " B"] = ABSENT
    input_ids: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    method: str = field(default="", metadata={"static": True})
    norm: str | None = field(default=None, metadata={"static": True})

    @property
    def meaning(self) -> str:
        """What the numbers are, in a phrase."""
        return MEANINGS[self.method].format(norm=GRADIENT_NORMS.get(self.norm or ""))

    def top(self, k: int) -> TopShares:
        """The k tokens of largest absolute value in each row, `[k,B]`.

        A row of fewer real tokens ends with columns of padding, of value zero.
        """
        checked_count("k", k, self.tokens.shape[-1])
        # -1 at padding, so that a real token whose share is zero comes before it.
        size = jnp.where(self.mask, jnp.abs(self.tokens), -1)
        # Results have the k entries first and examples last; top_k sorts the last axis.
        index = jnp.moveaxis(jax.lax.top_k(size, k)[1], -1, 0)
        return TopShares(jnp.take_along_axis(self.tokens, index.T, -1).T, index)

    def to_table(self, tokenizer: Any = None) -> Table:
        """A row for each real token: row, position (the column), token, attribution.

        With a tokenizer, tokens are texts as they continue a text; else ids.
        """
        columns = ("row", "position", "token", "attribution")
        table = Table({name: [] for name in columns})
        ids, values = np.asarray(self.input_ids), np.asarray(self.tokens)
        for row, at in np.argwhere(np.asarray(self.mask)).tolist():
            token = int(ids[row, at])
            named = token if tokenizer is None else continuation(tokenizer, token)
            for name, entry in zip(columns, (row, at, named, float(values[row, at])), strict=True):
                table[name].append(entry)
        return table
