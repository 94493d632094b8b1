"""Both ends of the stream: token ids become its first point, and its last becomes logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arrakis_jax.core.axes import Array, Float, Int, over
from arrakis_jax.core.checks import tokens_and_mask
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.numerics import contract
from arrakis_jax.nn.linear import product, softcap
from arrakis_jax.nn.site import Sites
from arrakis_jax.stream.padding import Padding


class Ends(nnx.Module):
    """The embedding and the unembedding of a Transformer: all that is not in its blocks."""

    config: ModelConfig
    w_e: Any
    w_project_in: Any
    norm_embed: Any
    w_pos: Any
    norm_final: Any
    w_project_out: Any
    w_u: Any
    b_u: Any

    def embed_tokens(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The token embeddings as the stream holds them: scaled, projected and normed.

        Position embeddings are not added. An id outside of the vocabulary gives NaN.
        """
        return self._embedded(_rows(self.w_e[...], tokens))

    def _embedded(self, e: Float[Array, "... M"]) -> Float[Array, "... D"]:
        """Rows of the embedding as the stream holds them."""
        # The scale is rounded to the weights' dtype, as Gemma's code does.
        scale = jnp.asarray(self.config.embed_scale, self.config.dtype).astype(self.config.acc)
        x = e.astype(self.config.acc) * scale
        if self.w_project_in is not None:
            rows = x.reshape(-1, x.shape[-1])
            rows = product("NM,MD->ND", rows, self.w_project_in[...], config=self.config)
            x = rows.reshape(*x.shape[:-1], -1)
        return x if self.norm_embed is None else self.norm_embed(x, Sites(), "norm_embed_scale")

    def mean_embedding(self) -> Float[Array, " D"]:
        """The mean of all token embeddings, as the stream holds them."""
        # Without a norm the embedding is linear, so the mean may be taken first.
        if self.norm_embed is None:
            return self._embedded(jnp.mean(self.w_e[...].astype(self.config.acc), 0))
        # One token at a time: normed all at once, they would be a float32 copy of the table.
        zero = jnp.zeros(self.config.d_model, self.config.acc)

        def add(total: Array, e: Array) -> tuple[Array, None]:
            return total + self._embedded(e), None

        return jax.lax.scan(add, zero, self.w_e[...])[0] / self.config.vocab_size

    def embed_positions(self, position: Int[Array, "..."]) -> Float[Array, "... D"]:
        """The learned position embeddings, NaN beyond the table. The model must have them."""
        assert self.w_pos is not None
        offset = self.config.position_offset
        return _rows(self.w_pos[...], position + offset).astype(self.config.acc)

    def embed(
        self, tokens: Int[Array, "B T"], *, mask: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Token plus learned position embedding: the stream entering block 0, zero at padding."""
        tokens, mask = tokens_and_mask(tokens, mask)
        padding = Padding.of(tokens.shape, mask)
        # Any id may stand at padding, even one outside of the vocabulary, which would give NaN.
        if padding.mask is not None:
            tokens = jnp.where(padding.mask, tokens, 0)
        x_BTD = self.embed_tokens(tokens)
        if self.w_pos is not None:
            x_BTD = x_BTD + self.embed_positions(padding.rank)
        return x_BTD if padding.mask is None else jnp.where(padding.mask[..., None], x_BTD, 0)

    def unembedding(self, ids: int | Int[Array, "..."] | None = None) -> Float[Array, "... D"]:
        """The directions that read these tokens' logits, `[...,D]`, or all tokens' as `[V,D]`.

        `logit = final_norm(x) . unembedding + unembedding_bias`, before a soft-cap. Factors on the
        logits are included. An id outside of the vocabulary gives NaN.
        """
        if ids is None:
            rows = self.w_e[...] if self.w_u is None else self.w_u[...].T
        elif self.w_u is None:
            rows = _rows(self.w_e[...], ids)
        else:
            rows = jnp.moveaxis(_rows(self.w_u[...], ids, axis=1), 0, -1)
        rows = rows.astype(self.config.acc) * self.config.logit_scale
        if self.w_project_out is not None:
            rows = contract("...M,DM->...D", rows, self.w_project_out[...])
        return rows

    def unembedding_bias(self, ids: Int[Array, "..."]) -> Float[Array, "..."]:
        """The bias on the logits of these token ids; zero in a model without one."""
        if self.b_u is None:
            return jnp.zeros(ids.shape, self.config.acc)
        return _rows(self.b_u[...], ids).astype(self.config.acc) * self.config.logit_scale

    def final_norm(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The stream through the final norm, as the unembedding reads it."""
        return x if self.norm_final is None else self.norm_final(x, Sites(), "norm_final_scale")

    def unembed(
        self,
        y_BTD: Float[Array, "B T D"],
        start: int | Int[Array, ""] = 0,
        size: int | None = None,
    ) -> Float[Array, "B T V"]:
        """The logits of the normed stream, for all tokens or for `size` tokens from `start`.

        `start` may be traced. If fewer than `size` tokens follow it, it is moved back.
        """
        config = self.config

        def chosen(w: Array, axis: int) -> Array:
            return w if size is None else jax.lax.dynamic_slice_in_dim(w, start, size, axis)

        y_BTM = y_BTD
        if self.w_project_out is not None:
            y_BTM = product("BTD,DM->BTM", y_BTD, self.w_project_out[...], config=config)
        one_row = y_BTM.shape[:2] == (1, 1)
        if one_row and config.operands == jnp.bfloat16:
            # A second row of zeros: on CPU, XLA widens the whole unembedding for a single row.
            y_BTM = jnp.concatenate([y_BTM, jnp.zeros_like(y_BTM)], 1)
        if self.w_u is None:
            logits = product("BTM,VM->BTV", y_BTM, chosen(self.w_e[...], 0), config=config)
        else:
            logits = product("BTM,MV->BTV", y_BTM, chosen(self.w_u[...], 1), config=config)
        logits = logits[:, :1] if one_row else logits
        if self.b_u is not None:
            b_u = chosen(self.b_u[...], 0).astype(logits.dtype)
            logits = logits + over(b_u, logits)
        scale = config.logit_scale
        return softcap(logits if scale == 1 else logits * scale, config.logit_softcap)


def _rows(table: Array, index: int | Array, axis: int = 0) -> Array:
    """The entries at these indices of an axis; NaN where an index is negative or too large."""
    # `take` counts negative indices from the end. They are moved beyond the end, where it fills.
    return jnp.take(table, jnp.where(index < 0, table.shape[axis], index), axis, mode="fill")
