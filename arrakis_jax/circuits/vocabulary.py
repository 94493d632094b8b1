"""Rows of tables over the vocabulary: which tokens they are of, and their largest entries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import checked_ids, host
from arrakis_jax.core.errors import expected
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record

Rows = tuple[Int[Array, " N"], Int[Array, " N"] | None]  # tokens, and learned positions if any

COLUMNS = 8192  # how many tokens of the vocabulary are looked at at a time


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class TopTokens(Record):
    """The largest entries of each of N rows of a table, in descending order.

    Attributes:
        tokens: `[N,k]`, their columns, token ids.
        values: `[N,k]`, the entries.
    """

    tokens: Int[Array, "N k"]
    values: Float[Array, "N k"]


def top_tokens(
    vocab_size: int,
    k: int,
    n_rows: int,
    entries: Callable[[Int[Array, " M"]], Float[Array, "N M"]],
    chunk: int = COLUMNS,
) -> TopTokens:
    """The k largest of `entries(ids) [N,M]` over all token ids, a chunk of them at a time.

    The whole table would take `N V` entries: only a chunk and the k best so far exist at once.
    """
    chunk = min(chunk, vocab_size)
    starts = jnp.arange(0, vocab_size, chunk)
    # The dtype of the entries, without computing any.
    dtype = jax.eval_shape(entries, jax.ShapeDtypeStruct((1,), jnp.int32)).dtype
    nothing = (jnp.full((n_rows, k), -jnp.inf, dtype), jnp.zeros((n_rows, k), jnp.int32))

    def step(best: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
        ids = start + jnp.arange(chunk, dtype=jnp.int32)
        inside = ids < vocab_size  # the last chunk may reach beyond the vocabulary
        in_chunk = jnp.where(inside[None], entries(jnp.where(inside, ids, 0)), -jnp.inf)
        values = jnp.concatenate([best[0], in_chunk], 1)
        tokens = jnp.concatenate([best[1], jnp.broadcast_to(ids[None], in_chunk.shape)], 1)
        values, index = jax.lax.top_k(values, k)
        return (values, jnp.take_along_axis(tokens, index, 1)), None

    values, tokens = jax.lax.scan(step, nothing, starts.astype(jnp.int32))[0]
    return TopTokens(tokens=tokens, values=values)


def embedded_rows(model: Transformer, rows: Rows) -> Float[Array, "N D"]:
    """What the stream holds of tokens before the first layer, at learned positions or at none."""
    tokens, positions = rows
    x_ND = model.embed_tokens(tokens)
    return x_ND if positions is None else x_ND + model.embed_positions(positions)


def checked_rows(model: Transformer, ids: Any, positions: Any, name: str) -> Rows:
    """Token ids and positions as `[N]`; one of them alone as N = 1."""
    shape = np.shape(ids) or (1,)
    if len(shape) != 1:
        do = "flatten them"
        raise ValueError(expected(name, "an int or `[N]`", f"shape {shape}", do))
    tokens = checked_ids(model.config, ids, shape, name=name)
    if positions is None:
        return tokens, None
    if model.config.positions != "learned":
        got = f"positions for a model with positions={model.config.positions!r}"
        do = "leave them out"
        raise ValueError(expected("positions", "None without learned ones", got, do))
    positions = np.asarray(positions) if host(positions) is not None else positions
    if positions.shape not in ((), shape) or not jnp.issubdtype(positions.dtype, jnp.integer):
        got = f"{positions.dtype} of shape {positions.shape}"
        must, do = f"an int or ints of shape {shape}", "give one for all, or one each"
        raise ValueError(expected("positions", must, got, do))
    values, most = host(positions), model.config.max_positions
    if values is not None and ((values < 0) | (values >= most)).any():
        do = "this model has no others"
        raise IndexError(expected("positions", f"in [0, {most})", values.ravel()[:3].tolist(), do))
    return tokens, jnp.broadcast_to(jnp.asarray(positions, jnp.int32), shape)
