"""Prompts as one batch: token ids with the mask that says which of them are real."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from arrakis_jax.core.axes import Bool, Int
from arrakis_jax.core.placement import rows_over

# The id at padding. No vocabulary has it, so ids that lost their mask are refused, not run.
PADDING_ID = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """A padded batch. Wherever tokens are taken, it stands for `tokens` and `mask` together.

    It unpacks as `tokens, mask = prompts`. `len(prompts)` is the number of prompts. An index, a
    slice or an array of them selects prompts: `prompts[0]` is a batch of one, of the same width.
    `np.asarray(prompts)` are the ids.

    Attributes:
        tokens: `[B,T]`. Masked ids are not read; `encode` writes -1 there, which no vocabulary has.
        mask: `[B,T]`, True at real tokens.

    Example:
        >>> model, tokenizer = demo_model()
        >>> prompts = encode(tokenizer, ["Alice and Tom", "Lucy"])
        >>> len(prompts), prompts.width, run(model, prompts[:1]).logits.shape
        (2, 4, (1, 4, 451))
    """

    tokens: Int[Any, "B T"]
    mask: Bool[Any, "B T"]

    @property
    def width(self) -> int:
        """The number of columns T, padding included."""
        return self.tokens.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[B,T]` of the ids."""
        return self.tokens.shape

    def __len__(self) -> int:
        """The number of prompts."""
        return self.tokens.shape[0]

    def __iter__(self) -> Iterator[Any]:
        """`tokens`, then `mask`: so that `tokens, mask = prompts`."""
        return iter((self.tokens, self.mask))

    def __getitem__(self, index: Any) -> "Prompts":
        """Some of the prompts, as a batch of the same width."""
        if isinstance(index, int | np.integer):
            if not -len(self) <= index < len(self):
                # Also ends a loop over indices, as a list does.
                raise IndexError(f"prompt {index} of {len(self)}")
            index = slice(index, None if index == -1 else index + 1)
        return Prompts(self.tokens[index], self.mask[index])

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        """The ids."""
        return np.array(self.tokens, dtype, copy=copy)

    def place(self, mesh: Mesh, axis: str = "data") -> "Prompts":
        """The prompts divided over an axis of a mesh: each device then runs its own rows.

        Raises:
            ValueError: if the mesh has no such axis, or the number of prompts does not divide.
        """
        return rows_over(self, mesh, axis)

    def __repr__(self) -> str:
        """The shape, and how many tokens are real."""
        real = self.mask if isinstance(self.mask, np.ndarray) else None
        tokens = "" if real is None else f", {int(real.sum())} real tokens"
        return f"Prompts({self.tokens.shape[0]} prompts of width {self.width}{tokens})"
