"""What input attributions work on: token embeddings, and the target as a function of them."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.attribution.residual_gradients import target_value
from arrakis_jax.attribution.result import Attribution
from arrakis_jax.core.axes import Array, Float, over
from arrakis_jax.core.checks import checked_ids, checked_tokens, host
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.forward.targets import Target
from arrakis_jax.nn.transformer import Edits, Transformer
from arrakis_jax.stream.padding import Padding


@dataclass(frozen=True)
class Inputs:
    """The token embeddings of a batch, and its target as a function of them.

    Attributes:
        padding: where the real tokens stand.
        ids: `[B,T]`, the token ids, 0 at padding.
        e_BTD: token embeddings, as the stream holds them; zero at padding.
        added_BTD: learned positions, which are added to them, or zero.
    """

    model: Transformer
    mask: Array | None
    target: Target
    padding: Padding
    ids: Array
    e_BTD: Array
    added_BTD: Array

    @classmethod
    def of(cls, model: Transformer, tokens: Array, mask: Array | None, target: Target) -> "Inputs":
        """The inputs of checked tokens."""
        padding = Padding.of(tokens.shape, mask)
        real = padding.real[..., None]
        ids = jnp.where(padding.real, tokens, 0)  # ids at padding may be anything
        e_BTD = jnp.where(real, model.embed_tokens(ids), 0)
        added_BTD = jnp.zeros_like(e_BTD)
        if model.w_pos is not None:
            added_BTD = jnp.where(real, model.embed_positions(padding.rank), 0)
        return cls(model, mask, target, padding, ids, e_BTD, added_BTD)

    def value(self, e_BTD: Float[Array, "B T D"], edits: Edits = ()) -> Float[Array, " B"]:
        """The target with these token embeddings; learned positions are added."""
        x_BTD = e_BTD + self.added_BTD
        return target_value(self.model, x_BTD, self.mask, self.target, edits=edits)[0]

    def gradient(self, e_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each row's gradient of its target with respect to these token embeddings."""
        # Rows do not interact: the gradient of their sum holds each row's own.
        return jax.grad(lambda e: self.value(e).sum())(e_BTD)

    def baseline(self, baseline: Array | None) -> Float[Array, "B T D"]:
        """The embeddings of a checked baseline; zero at padding."""
        real = self.padding.real
        if baseline is None:
            b = self.model.mean_embedding()
        elif jnp.issubdtype(baseline.dtype, jnp.integer):
            b = self.model.embed_tokens(jnp.where(real, baseline, 0))
        else:
            b = baseline
        return jnp.where(real[..., None], over(b, self.e_BTD), 0)

    def result(self, tokens_BT: Array, target_B: Array, **rest: Any) -> Attribution:
        """The attribution with its token ids and mask; NaN in rows whose target is NaN."""
        real = self.padding.real
        # A target that is NaN (an id or a position that is not there) must not pass as zeros.
        tokens_BT = jnp.where(jnp.isnan(target_B)[:, None], jnp.nan, tokens_BT)
        tokens_BT = jnp.where(real, tokens_BT, 0)
        return Attribution(tokens=tokens_BT, target=target_B, input_ids=self.ids, mask=real, **rest)


def checked_baseline(
    config: ModelConfig, baseline: Any, tokens: Array, mask: Array | None, *, check: bool = False
) -> Any:
    """A baseline as an array: token ids, an int or `[B,T]`, or embeddings; None for the mean.

    Raises:
        TypeError, ValueError: for one that is neither, of another shape, or not finite.
    """
    # isinstance first: an array compared with a string is an array.
    if baseline is None or (isinstance(baseline, str) and baseline == "mean"):
        return None
    if isinstance(baseline, str) and baseline == "zero":
        return np.zeros(config.d_model, config.acc)
    array = baseline if isinstance(baseline, jax.Array) else np.asarray(baseline)
    if jnp.issubdtype(array.dtype, jnp.integer):
        if array.ndim == 0:
            return checked_ids(config, array, (), name="baseline", check=check)
        if array.shape != tokens.shape:
            must = f"one token id, or ids of the tokens' shape {tokens.shape}"
            do = "embeddings are floats"
            raise ValueError(expected("baseline", must, f"shape {array.shape}", do))
        return checked_tokens(config, array, mask, check=check, name="baseline")[0]
    if not jnp.issubdtype(array.dtype, jnp.floating):
        must = "'mean', 'zero', token ids or embeddings"
        raise TypeError(expected("baseline", must, repr(baseline), "give one of them"))
    full = (*tokens.shape, config.d_model)
    if array.shape not in (full, full[1:], full[2:]):
        do = "give token embeddings"
        must = f"of shape {full[2:]}, {full[1:]} or {full}"
        raise ValueError(expected("baseline", must, f"shape {array.shape}", do))
    values = host(array, check)
    # Values at padding are never read, and may be anything.
    if values is not None and anywhere(~np.isfinite(values).all(-1), tokens, mask):
        raise ValueError(expected("baseline", "finite", "NaN or infinity", "give embeddings"))
    return array.astype(config.acc)


def anywhere(flags: Any, tokens: Array, mask: Array | None) -> bool:
    """Whether flags, broadcast to the tokens, are set at a real one.

    Without a readable mask, only flags at every token count.
    """
    flags = np.broadcast_to(flags, tokens.shape)
    real = np.ones(tokens.shape, bool) if mask is None else host(mask)
    return bool(flags.all() if real is None else flags[real].any())
