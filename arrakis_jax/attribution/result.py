"""The result of an input attribution: a number for each token, and its meaning."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float, Int
from arrakis_jax.results.ranking import Top, top
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

    def top(self, k: int) -> Top:
        """The k tokens of largest absolute value in each row, `[k,B]`.

        A row of fewer real tokens ends with columns of padding, of value zero.
        """
        return top(self.tokens.T, k, among=self.mask.T)

    def to_table(self, tokenizer: Any = None) -> Table:
        """A row for each real token: row, position (the column), token, attribution.

        With a tokenizer, tokens are texts as they continue a text; else ids.
        """
        ids, values = np.asarray(self.input_ids), np.asarray(self.tokens)

        def rows() -> Iterator[tuple]:
            for row, at in np.argwhere(np.asarray(self.mask)).tolist():
                token = int(ids[row, at])
                named = token if tokenizer is None else continuation(tokenizer, token)
                yield row, at, named, float(values[row, at])

        return Table.of_rows(("row", "position", "token", "attribution"), rows())
