"""How strongly later heads read what earlier heads write, from weights alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.circuits.factored import Factored
from arrakis_jax.circuits.matrices import Distance, ov_matrices, qk_matrices
from arrakis_jax.core.axes import Array, Float
from arrakis_jax.core.checks import checked_count
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract, ratio
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record

_KINDS = ("q", "k", "v")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class CompositionBaseline(Record):
    """Composition scores of random heads of a model's shapes; those of all kinds are alike.

    Attributes:
        scores: `[N]`, one for each draw.
    """

    scores: Float[Array, " N"]

    @property
    def mean(self) -> Float[Array, ""]:
        """Their mean, a little below `rms`."""
        return jnp.mean(self.scores)

    @property
    def std(self) -> Float[Array, ""]:
        """Their standard deviation."""
        return jnp.std(self.scores)

    @property
    def rms(self) -> Float[Array, ""]:
        """The root of their mean square, `1 / sqrt(D)` in expectation."""
        return jnp.sqrt(jnp.mean(jnp.square(self.scores)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Composition(Record):
    """How much of an earlier head's output each later head's queries, keys and values read.

    Scores are `[L,H,L,H]`, the earlier head first; zero unless its layer is the earlier one.

    Attributes:
        q: scores of Q-composition.
        k: scores of K-composition.
        v: scores of V-composition.
        concentration_qk: `[L,H]`, `sum(s^4) / sum(s^2)^2` of W_QK's singular values s: 1 for a
            single one, 1 / n for n equal ones, 0 for a head of zeros.
        concentration_ov: the same of W_OV.
        baseline: what random heads have: `1 / sqrt(D)`, the root mean square of their scores.
    """

    q: Float[Array, "L H L H"]
    k: Float[Array, "L H L H"]
    v: Float[Array, "L H L H"]
    concentration_qk: Float[Array, "L H"]
    concentration_ov: Float[Array, "L H"]
    baseline: float = field(metadata={"static": True})

    @property
    def excess(self) -> Composition:
        """Scores minus the baseline, whose own baseline is then zero."""
        return self._shifted(self.baseline, 1.0)

    def z_scores(self, random: CompositionBaseline) -> Composition:
        """Scores in standard deviations above the mean of random heads, of Gaussian weights.

        Trained heads scatter more than random ones, because few of their singular values are
        large: see `oriented_z_scores`.
        """
        return self._shifted(random.mean, random.std)

    @property
    def oriented_z_scores(self) -> Composition:
        """Z-scores of how each pair is oriented, given its singular values.

        If the two matrices stood in random orientation to each other, their squared score would
        have mean 1 / D and a variance that follows from their singular values. This is
        `(score^2 - 1 / D)` over that standard deviation. It needs scores, not their `excess`.
        """
        d = round(self.baseline**-2)  # the baseline is 1 / sqrt(D)
        earlier = self.concentration_ov[:, :, None, None]
        values = {}
        for kind in _KINDS:
            later = self.concentration_ov if kind == "v" else self.concentration_qk
            variance = _variance(earlier, later[None, None], d)
            squares = jnp.square(getattr(self, kind)) - 1 / d
            values[kind] = self._of_pairs(ratio(squares, jnp.sqrt(jnp.maximum(variance, 0))))
        return replace(self, **values, baseline=0.0)

    def _shifted(self, mean: Array | float, std: Array | float) -> Composition:
        values = {kind: self._of_pairs((getattr(self, kind) - mean) / std) for kind in _KINDS}
        return replace(self, **values, baseline=0.0)

    def _of_pairs(self, values: Float[Array, "L H L H"]) -> Float[Array, "L H L H"]:
        """The values where the first layer is the earlier, and zero elsewhere."""
        n = values.shape[0]
        return jnp.where(np.triu(np.ones((n, n), bool), 1)[:, None, :, None], values, 0)


def _variance(a: Array, b: Array, d: int) -> Array:
    """The variance of a squared score in random orientation, from both concentrations.

    The squared score is `sum_ij p_i r_j Q_ij^2`, with Q uniform over rotations of d axes, and p and
    r the shares of the squared singular values. Its variance follows from the fourth moments of Q,
    with the concentrations `a = sum p^2` and `b = sum r^2`.
    """
    # Moments of entries of Q, times d (d + 2): E[Q_ij^4] is 3; E[Q_ij^2 Q_kl^2] is 1 in one row or
    # column, and (d + 1) / (d - 1) for entries that share neither.
    apart = (d + 1) / max(d - 1, 1)
    fourth = 3 * a * b + a * (1 - b) + b * (1 - a) + apart * (1 - a) * (1 - b)
    return fourth / (d * (d + 2)) - 1 / d**2


def composition_scores(
    model: Transformer, *, distance: Distance = 0, fold: bool = True
) -> Composition:
    """Q-, K- and V-composition of all pairs of heads in different layers.

    With M = W_OV of the earlier head, each is a Frobenius norm over the product of its two
    factors' norms: Q `|M W_QK|`, K `|M W_QK^T|`, V `|M W_OV|`, with the later head's matrices. In
    [0, 1]; heads of unrelated orientation score `1 / sqrt(D)`, whatever their singular values.
    Composition through MLPs is not seen, nor what norms of the stream between the layers change
    (`norm_placement="stream_..."`).

    Args:
        model: the transformer.
        distance: from the query to the key, on which W_QK depends with RoPE: an int, or ints `[N]`
            to average W_QK over. At 0 it compares contents alone. V does not depend on it.
        fold: fold norms into the weights, as `ov_matrices` and `qk_matrices` do.

    Returns:
        Composition of `[L,H,L,H]` arrays. Heads that share keys and values (GQA) have the same
        factors from them. Cost: pairs of heads times `D K^2`, one pair of layers at a time.

    Example:
        >>> model, tokenizer = demo_model()
        >>> scores = composition_scores(model)
        >>> scores.k.shape, round(scores.baseline, 4)
        ((4, 4, 4, 4), 0.0884)
        >>> random = composition_baseline(model, key=jax.random.key(0))
        >>> scores.z_scores(random).k.shape
        (4, 4, 4, 4)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    qk = qk_matrices(model, distance=distance, fold=fold)
    return _composition(model, qk, ov_matrices(model, fold=fold))


@compiled()
def _composition(model: Transformer, qk: Factored, ov: Factored) -> Composition:
    writes_LHDK = _narrow(ov.transposed)
    reads = {"q": _narrow(qk), "k": _narrow(qk.transposed), "v": _narrow(ov)}
    n_layers, n_heads = writes_LHDK.shape[:2]

    def of_layers(pair: tuple[Array, Array]) -> dict[str, Array]:
        earlier, later = pair
        return {kind: _between(writes_LHDK[earlier], read[later]) for kind, read in reads.items()}

    zero_LLHH = jnp.zeros((n_layers, n_layers, n_heads, n_heads), writes_LHDK.dtype)
    scores = dict.fromkeys(reads, zero_LLHH)
    earlier, later = np.triu_indices(n_layers, 1)
    if earlier.size:
        # One pair of layers at a time: all at once would hold [L,L,H,H,K,K].
        of_pairs = jax.lax.map(of_layers, (jnp.asarray(earlier, int), jnp.asarray(later, int)))
        scores = {kind: zero_LLHH.at[earlier, later].set(x) for kind, x in of_pairs.items()}
    scores = {kind: jnp.swapaxes(values, 1, 2) for kind, values in scores.items()}
    return Composition(
        **scores,
        concentration_qk=_concentration(reads["q"]),
        concentration_ov=_concentration(reads["v"]),
        baseline=model.config.d_model**-0.5,
    )


def _narrow(matrix: Factored) -> Float[Array, "... D K"]:
    """The matrices in an orthonormal basis of their rows, over their norms; zero where those are.

    Their products with a matrix on the left keep their norms, at K columns in place of D.
    """
    # left right = left r^T q^T with right^T = q r, and q has orthonormal columns: it is dropped.
    rows = jnp.linalg.qr(jnp.swapaxes(matrix.right, -1, -2), mode="r")
    narrow = contract("...DK,...MK->...DM", matrix.left, rows)
    return ratio(narrow, jnp.linalg.norm(narrow, axis=(-2, -1), keepdims=True))


def _concentration(narrow: Float[Array, "... D K"]) -> Float[Array, ...]:
    """`sum(s^4)` of matrices with `sum(s^2) = 1`."""
    gram = contract("...DK,...DM->...KM", narrow, narrow)
    return jnp.sum(jnp.square(gram), (-2, -1))


def _between(write_HDK: Array, read_HDK: Array) -> Float[Array, "H H"]:
    """The norms of the products of every earlier head with every later one."""
    # Both are in orthonormal bases: the K x K products have the norms of the D x D ones.
    product = contract("HDK,NDM->HKNM", write_HDK, read_HDK)
    return jnp.sqrt(jnp.sum(jnp.square(product), (1, 3)))


def composition_baseline(
    model: Transformer, *, key: Array, draws: int = 300
) -> CompositionBaseline:
    """Composition scores of random heads: of Gaussian factors of the model's D and K.

    Their mean square is `1 / D` for matrices of any singular values in random orientation; how
    far they scatter depends on the shapes.

    Args:
        model: the transformer; only its shapes count.
        key: a key of jax.random.
        draws: how many pairs of heads.

    Returns:
        The scores `[N]`, with their `mean`, `std` and `rms`.

    Raises:
        ValueError: draws that are not a positive int.

    Example:
        >>> model, tokenizer = demo_model()
        >>> random = composition_baseline(model, key=jax.random.key(0), draws=100)
        >>> bool(abs(random.rms * 128**0.5 - 1) < 0.03)
        True
    """
    checked_count("draws", draws, 10**6)
    if not isinstance(key, jax.Array):
        raise TypeError(expected("key", "a key", repr(key), "such as jax.random.key(0)"))
    return _random_scores(model, key, draws=int(draws))


@compiled("draws")
def _random_scores(model: Transformer, key: Array, *, draws: int) -> CompositionBaseline:
    config = model.config

    # One draw at a time: all together would hold four D x K matrices for each.
    def draw(key: Array) -> Array:
        shape = (2, config.d_model, config.d_head)
        left, right = (jax.random.normal(key, shape, config.acc) for key in jax.random.split(key))
        heads = Factored(left=left, right=jnp.swapaxes(right, -1, -2))
        return _between(_narrow(heads[:1].transposed), _narrow(heads[1:]))[0, 0]

    return CompositionBaseline(scores=jax.lax.map(draw, jax.random.split(key, draws)))
