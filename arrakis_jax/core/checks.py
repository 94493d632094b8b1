"""Checks of arguments on the host, before anything is traced.

JAX clamps, wraps or propagates an index that is out of range; these functions raise. Shapes and
dtypes are always checked. Values are checked where that costs nothing: numpy arrays, lists and ints
always; a `jax.Array` if it is on the CPU and fully addressable, elsewhere only with `check=True`,
because reading it waits for the device; a traced array never.
"""

from dataclasses import is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from arrakis_jax.core.axes import Array, Bool, Int
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.placement import auto_placed
from arrakis_jax.core.prompts import PADDING_ID, Prompts

# Argument types, spelled for the docstrings of public functions.
Tokens = Int[Array, "B T"] | np.ndarray | list | Prompts
Mask = Bool[Array, "B T"] | np.ndarray | list
Ids = int | Int[Array, "..."] | np.ndarray | list


def host(value: Any, check: bool = False) -> np.ndarray | None:
    """The values as a numpy array, or None if they cannot or should not be read."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array):
        if not value.is_fully_addressable:
            return None
        if not check and any(d.platform != "cpu" for d in value.devices()):
            return None
    return np.asarray(value)


def checked_tokens(
    config: ModelConfig, tokens: Any, mask: Any = None, *, check: bool = False, name: str = "tokens"
) -> tuple[Array, Array | None]:
    """Token ids as int32 `[B,T]` and the mask as bool `[B,T]` or None.

    Raises:
        TypeError: tokens that are not integers, or a mask that is neither bool nor integer.
        ValueError: wrong rank or shape, an id outside of the vocabulary at a real token, mask
            values other than 0 and 1, a row without a real token, more tokens than positions, a
            mask other than that of the prompts.
    """
    tokens, mask = tokens_and_mask(tokens, mask)
    if is_dataclass(tokens):  # a residual stream, or a model's output
        got, do = type(tokens).__name__, "this runs the model: pass its `tokens` and `mask`"
        raise TypeError(expected(name, "token ids `[B,T]`", got, do))
    tokens = _array(name, tokens, "token ids `[B,T]`")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        do = "encode text with `encode(tokenizer, prompts)`"
        raise TypeError(expected(name, "integers", f"dtype {tokens.dtype}", do))
    if tokens.ndim != 2:
        do = "add a batch axis with tokens[None]" if tokens.ndim == 1 else "flatten other axes"
        raise ValueError(expected(name, "`[B,T]`, of rank 2", f"shape {tokens.shape}", do))
    if tokens.shape[1] == 0:
        raise ValueError(expected(name, "at least one token long", "T = 0", "drop such a batch"))
    real = None
    if mask is not None:
        mask, real = _checked_mask(mask, tokens.shape, check)
    # Ids at padding may be anything, so ids are checked only where the mask can be read as well.
    ids = host(tokens, check)
    if ids is not None and (mask is None or real is not None):
        wrong = (ids < 0) | (ids >= config.vocab_size)
        if real is not None:
            wrong &= real
        if wrong.any():
            b, t = np.argwhere(wrong)[0]
            do = "use this model's tokenizer, or mask padding out"
            if ids[b, t] == PADDING_ID:
                do = "this id marks padding: pass the batch's mask, or all that `encode` returned"
            must, got = f"in [0, {config.vocab_size}) at real tokens", f"{ids[b, t]} at row {b}"
            raise ValueError(expected(name, must, f"{got}, column {t}", do))
    if config.positions == "learned":
        # Padding takes no position of the table, so the longest row of real tokens counts.
        longest = tokens.shape[1]
        if mask is not None:
            longest = 0 if real is None else int(real.sum(-1).max(initial=0))
        if longest > config.max_positions:
            raise ValueError(
                expected(name, f"at most {config.max_positions} tokens long",
                         f"{longest}", "this model has no positions beyond; cut the text")
            )  # fmt: skip
    return _int32(tokens), mask


def tokens_and_mask(tokens: Any, mask: Any) -> tuple[Any, Any]:
    """Tokens and their mask: of `Prompts`, their own. ValueError for another mask beside it."""
    if not isinstance(tokens, Prompts):
        return tokens, mask
    if mask is not None and mask is not tokens.mask:
        given, own = host(mask), host(tokens.mask)
        if given is not None and own is not None and not np.array_equal(given, own):
            got, do = "another one", "leave it out: the prompts carry their mask"
            raise ValueError(expected("mask", "the prompts' own, or None", got, do))
    return tokens.tokens, tokens.mask


def _checked_mask(mask: Any, shape: tuple, check: bool) -> tuple[Array, np.ndarray | None]:
    mask = _array("mask", mask, "`[B,T]`")
    if mask.shape != shape:
        do = "give one value a token"
        raise ValueError(expected("mask", f"of the tokens' shape {shape}", f"{mask.shape}", do))
    if not (mask.dtype == bool or jnp.issubdtype(mask.dtype, jnp.integer)):
        do = "use mask != 0"
        raise TypeError(expected("mask", "bool or 0/1 integers", f"dtype {mask.dtype}", do))
    # The mask as bool on the host, or None where its values cannot be read.
    real = host(mask, check)
    if real is not None:
        if ((real != 0) & (real != 1)).any():
            do = "1 marks a real token, 0 padding"
            got = f"{np.setdiff1d(real, [0, 1])[:3].tolist()}"
            raise ValueError(expected("mask", "made of 0 and 1", got, do))
        real = real.astype(bool)
        empty = np.flatnonzero(~real.any(-1))
        if empty.size:
            do = "drop such rows"
            got = f"none in rows {empty[:5].tolist()}"
            raise ValueError(expected("mask", "true at a real token in every row", got, do))
    return jnp.asarray(mask, bool), real


def checked_ids(
    config: ModelConfig,
    ids: Any,
    shape: tuple[int, ...],
    *,
    name: str = "targets",
    check: bool = False,
) -> Array:
    """Token ids broadcast to `shape`: one int, or an array of exactly that shape.

    Raises:
        TypeError: ids that are not integers.
        ValueError: another shape, or an id outside of the vocabulary.
    """
    ids = _array(name, ids, "token ids")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        do = "use `token_id(tokenizer, text)`"
        raise TypeError(expected(name, "integer token ids", f"dtype {ids.dtype}", do))
    if ids.shape not in ((), shape):
        do = "give one id for all, or one each"
        raise ValueError(expected(name, f"an int or of shape {shape}", f"shape {ids.shape}", do))
    values = host(ids, check)
    if values is not None and ((values < 0) | (values >= config.vocab_size)).any():
        wrong = values[(values < 0) | (values >= config.vocab_size)][:3]
        do = "use this model's tokenizer"
        must = f"in [0, {config.vocab_size})"
        raise ValueError(expected(name, must, f"{wrong.tolist()}", do))
    return _int32(ids, shape)


def checked_position(position: Any, n_rows: int, mask: Any, length: int) -> Array:
    """A position, counted in real tokens, for each row: `[B]`.

    Raises:
        TypeError: a position that is not an integer.
        ValueError: neither one position nor one for each row.
        IndexError: a position that a row does not have.
    """
    position = _array("position", position, "an int")
    if not jnp.issubdtype(position.dtype, jnp.integer):
        do = "-1 is each row's last real token"
        raise TypeError(expected("position", "an integer", f"dtype {position.dtype}", do))
    if position.shape not in ((), (n_rows,)):
        got, do = f"shape {position.shape}", "give one for all rows, or one a row"
        raise ValueError(expected("position", f"an int or of shape ({n_rows},)", got, do))
    # `count` is each row's number of real tokens, or None where the mask cannot be read.
    values = host(position)
    count = np.asarray(length)
    if mask is not None:
        real = host(mask)
        count = None if real is None else real.sum(-1)
    if values is not None and count is not None:
        wrong = (values < -count) | (values >= count)
        if wrong.any():
            least = int(np.min(np.broadcast_to(count, wrong.shape)[wrong]))
            got = f"{np.broadcast_to(values, wrong.shape)[wrong][:3].tolist()}"
            do = "positions count a row's real tokens"
            raise IndexError(expected("position", f"in [{-least}, {least})", got, do))
    return _int32(position, (n_rows,))


def longest_row(shape: tuple[int, ...], mask: Any) -> int:
    """The most real tokens that a row has, or T if the mask cannot be read."""
    real = None if mask is None else host(mask)
    return shape[-1] if real is None else int(real.sum(-1).max(initial=0))


def checked_positions(
    positions: Any, shape: tuple[int, ...], mask: Any, *, name: str = "positions"
) -> tuple[int, ...] | None:
    """Positions as a tuple of ints; None for None.

    Raises:
        TypeError: positions that are not integers, or not known before tracing.
        IndexError: a position that no row has.
    """
    positions = as_tuple(name, positions)
    longest = longest_row(shape, mask)
    for position in positions or ():
        if not -longest <= position < longest:
            do = "no row has such a token; positions count a row's real tokens"
            raise IndexError(expected(name, f"in [-{longest}, {longest})", position, do))
    return positions


def checked_layers(layers: Any, n_layers: int) -> tuple[int, ...] | None:
    """Layers as an ascending tuple of ints counted from 0, each once; None for None."""
    layers = as_tuple("layers", layers)
    if layers is None:
        return None
    return tuple(sorted({checked_layer(i, n_layers, name="layers") for i in layers}))


def checked_layer(layer: Any, n_layers: int, *, name: str = "layer_idx", end: int = 0) -> Any:
    """A layer counted from 0: an int, or a traced scalar as it is (negative ones from the end).

    `end=1` also accepts `n_layers`, the point after the last block.

    Raises:
        TypeError: a layer that is not an integer scalar.
        IndexError: a layer that the model does not have.
    """
    if isinstance(layer, Tracer):
        if not jnp.issubdtype(layer.dtype, jnp.integer) or layer.ndim:
            got, do = f"{layer.aval}", "vmap or scan over layers instead"
            raise TypeError(expected(name, "an integer scalar", got, do))
        # Its value is not known before the program runs, so its range is not checked.
        return jnp.where(layer < 0, layer + n_layers, layer)
    value = np.asarray(layer)
    if value.ndim or not np.issubdtype(value.dtype, np.integer):
        do = "give one layer's index"
        raise TypeError(expected(name, "an integer", repr(layer), do))
    if not -n_layers <= value < n_layers + end:
        do = f"the model has {n_layers} layers, and negative indices count from the end"
        must = f"in [{-n_layers}, {n_layers + end})"
        raise IndexError(expected(name, must, int(value), do))
    return int(value) + n_layers * (value < 0).item()


def checked_count(name: str, value: Any, most: int) -> None:
    """Raises unless `value` is an int in [1, most]."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not 1 <= value <= most:
        do = "there are no more"
        raise ValueError(expected(name, f"an int in [1, {most}]", value, do))


def checked_seed(seed: Any) -> Array:
    """A seed as an array, so that another one compiles nothing.

    Raises:
        ValueError: for anything but an int in [0, 2^32).
    """
    array = seed if isinstance(seed, jax.Array) else np.asarray(seed)
    known = host(array)
    fits = array.shape == () and jnp.issubdtype(array.dtype, jnp.integer)
    if not fits or (known is not None and not 0 <= known < 2**32):
        raise ValueError(expected("seed", "an int in [0, 2^32)", repr(seed), "such as 0"))
    return jnp.asarray(array, jnp.uint32)


def checked_numbers(name: str, values: Any, do: str) -> Array:
    """An array of numbers; TypeError for anything else."""
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(expected(name, "an array of numbers", type(values).__name__, do))
    return jnp.asarray(array)


def checked_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(expected(name, f"one of {choices}", repr(value), "choose one of them"))


def _int32(value: Any, shape: tuple[int, ...] | None = None) -> Any:
    """The values as int32, broadcast to `shape`."""
    # A numpy array stays one: jit transfers it with its call, which saves a transfer of its own.
    if isinstance(value, jax.Array):
        value = value if value.dtype == jnp.int32 else value.astype(jnp.int32)
        return value if shape in (None, value.shape) else jnp.broadcast_to(value, shape)
    value = value.astype(np.int32)
    return value if shape is None else np.broadcast_to(value, shape)


def _array(name: str, value: Any, contents: str) -> Any:
    """The value as an array of JAX or numpy; TypeError for ragged lists and text."""
    if isinstance(value, jax.Array):
        return auto_placed(value)
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype == object or array.dtype.kind in "US":
        do = "pad ragged rows and pass a mask, or use `encode` or `token_id` on text"
        raise TypeError(expected(name, f"an array of {contents}", f"{type(value).__name__}", do))
    return array


def as_tuple(name: str, values: Any) -> tuple[int, ...] | None:
    """A tuple of ints from any concrete integers; None for None, TypeError for anything else."""
    if values is None:
        return None
    array = None if isinstance(values, Tracer) else _integers(values)
    if array is None:
        do = "they decide the result's shape, so they must be known before tracing"
        raise TypeError(expected(name, "a tuple of integers, or None", repr(values), do))
    return tuple(array.tolist())


def _integers(values: Any) -> np.ndarray | None:
    try:
        array = np.array(values if isinstance(values, np.ndarray) else list(values))
    except (TypeError, ValueError):  # no sequence, or its entries are traced or unequal in shape
        return None
    if array.ndim == 1 and (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        return array.astype(int)
    return None
