"""Does an attribution depend on what the model has learned? With random weights it must change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.core.axes import Array, Bool, Float
from arrakis_jax.core.checks import checked_layers, checked_seed
from arrakis_jax.evaluation.agreement import agreement
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.nn.walk import Place, walk


def randomised_weights(
    model: Transformer, seed: int = 0, *, layers: Any = None, outside: bool = True
) -> Transformer:
    """The model with the entries of each parameter in random order: same scales, nothing learned.

    Args:
        model: the transformer, left as it is.
        seed: of the permutations.
        layers: the layers whose parameters are permuted, each by itself; None for all.
        outside: whether to permute also embeddings, final norm and unembedding.

    Returns:
        Another model of the same config.

    Raises:
        TypeError, IndexError: for layers that are not there.

    Example:
        >>> model, _ = demo_model()
        >>> other = randomised_weights(model, layers=(3,), outside=False)
        >>> bool((other.blocks.attn.w_q[:3] == model.blocks.attn.w_q[:3]).all())
        True

    Reference:
        Adebayo et al. 2018, *Sanity Checks for Saliency Maps*.
    """
    chosen = checked_layers(layers, model.config.n_layers)
    n_layers = model.config.n_layers
    # An array and no static choice: one program serves every set of layers.
    which = jnp.ones(n_layers, bool)
    if chosen is not None:
        which = jnp.zeros(n_layers, bool).at[jnp.array(chosen, int)].set(True)
    return _randomised(model, jax.random.key(checked_seed(seed)), which, jnp.asarray(outside, bool))


@compiled()
def _randomised(
    model: Transformer, key: Array, which_L: Bool[Array, " L"], outside: Bool[Array, ""]
) -> Transformer:
    # Every parameter has a key of its own, from its number among all of the model's.
    parts, structure = jax.tree.flatten(model, is_leaf=lambda part: isinstance(part, Block))
    first = np.cumsum([0, *(len(jax.tree.leaves(part)) for part in parts)])
    is_block = [isinstance(part, Block) for part in parts]
    first_of_segment = [n for n, block in zip(first, is_block, strict=False) if block]

    def permuted_block(_: None, place: Place, chosen: Array) -> tuple[None, Block]:
        leaves, block = jax.tree.flatten(place.block)
        numbered = enumerate(leaves, first_of_segment[place.segment])
        keys = [jax.random.fold_in(jax.random.fold_in(key, n), place.index) for n, _ in numbered]
        permuted = [
            jnp.where(chosen, _permuted(key, leaf), leaf)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return None, jax.tree.unflatten(block, permuted)

    blocks = iter(walk(model, permuted_block, None, which_L).by_segment)
    parts = [
        next(blocks)
        if block
        else jnp.where(outside, _permuted(jax.random.fold_in(key, n), part), part)
        for n, block, part in zip(first, is_block, parts, strict=False)
    ]
    return jax.tree.unflatten(structure, parts)


def _permuted(key: Array, x: Array) -> Array:
    return jax.random.permutation(key, x.reshape(-1)).reshape(x.shape)


def randomisation_check(
    model: Transformer, attribute: Callable[[Transformer], Array], *, seed: int = 0
) -> Float[Array, "N B"]:
    """How an attribution changes as weights are randomised from the output down.

    Args:
        model: the transformer.
        attribute: a function of a model that returns scores `[...,B]`. It is called L + 2 times,
            with models of one shape, so that it compiles once.
        seed: of the permutations.

    Returns:
        `[L+1,B]`, the rank correlation of the scores with the scores of the model itself: with the
        last layer randomised, the last two, ... all layers, and at last with everything. Before
        that, embeddings, final norm and unembedding are left as they are. An attribution that
        explains the model must lose its correlation on the way.

    Example:
        >>> model, tokenizer = demo_model()
        >>> tokens, mask = encode(tokenizer, "Alice and Tom met, Tom gave a book to")
        >>> randomisation_check(
        ...     model, lambda m: feature_attribution(m, tokens, 3, mask=mask).tokens.T
        ... ).shape
        (5, 1)

    Reference:
        Adebayo et al. 2018, cascading randomisation.
    """
    n_layers = model.config.n_layers
    scores = attribute(model)
    correlations = []
    for first in (*range(n_layers - 1, -1, -1), None):
        layers = None if first is None else tuple(range(first, n_layers))
        other = randomised_weights(model, seed, layers=layers, outside=first is None)
        correlations.append(agreement(attribute(other), scores).rank_correlation)
    return jnp.stack(correlations)
