"""Whether heads copy tokens, and whether they seek the token they stand on: signs of eigenvalues.

A head's circuit between tokens, V x V, is never formed: its nonzero eigenvalues are those of a
K x K matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from arrakis_jax.circuits.factored import Factored, eigenvalues
from arrakis_jax.circuits.matrices import Distance, ov_matrices, qk_matrices
from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import Ids, checked_ids
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record

_CHUNK = 4096  # how many tokens' rows exist in float32 at a time
_BATCH = 64  # how many tokens' logits exist at a time


def copying_scores(model: Transformer) -> Float[Array, "L H"]:
    """Whether every head raises the tokens it reads: the signs of its OV circuit's eigenvalues.

    `sum(lambda) / sum(|lambda|)` over the eigenvalues of `W_E W_OV W_U`, V x V: 1 if the head
    writes towards the same token that it reads, -1 if away from it, about 0 for unrelated ones.
    The sum is real. They come from the K x K matrix `W_O W_U W_E W_V`, whose eigenvalues are the
    same but for zeros.

    Norms are folded in, as `ov_matrices(model)` does, and likewise gain and centring of the final
    norm into `W_U` and of a norm of the embedding into `W_E`. Their scales, positive factors of
    each token or text, are left out, as are all biases and the MLPs.

    Args:
        model: the transformer.

    Returns:
        `[L,H]`, in [-1, 1]; 0 for a head without any effect on logits. Numpy computes the
        eigenvalues on the host: inside of jit use `copying_traces`.

    Raises:
        TypeError: inside of jit, vmap or grad.

    Example:
        >>> model, tokenizer = demo_model()
        >>> copying_scores(model).shape
        (4, 4)

    Reference:
        Elhage et al. 2021, "Detecting copying behavior".
    """
    return _positive(copying_cores(model, ov_matrices(model)))


def matching_scores(model: Transformer, *, distance: Distance = 0) -> Float[Array, "L H"]:
    """Whether every head seeks the token that it stands on: `copying_scores` of the QK circuit.

    `sum(lambda) / sum(|lambda|)` over the eigenvalues of `W_E W_QK W_E^T`, V x V: 1 if every
    token scores itself up, -1 if down.

    Args:
        model: the transformer.
        distance: from the query to the key, on which W_QK depends with RoPE: an int, or ints `[N]`
            to average W_QK over.

    Returns:
        `[L,H]`, in [-1, 1]; 0 for a head whose scores do not depend on tokens.

    Raises:
        TypeError: inside of jit, vmap or grad, as `copying_scores`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> matching_scores(model).shape
        (4, 4)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    return _positive(matching_cores(model, qk_matrices(model, distance=distance)))


def copying_traces(model: Transformer) -> Float[Array, "L H"]:
    """The mean logit that a token gets from reading itself, through every head: no eigenvalues.

    The trace of `W_E W_OV W_U` over V, folded as in `copying_scores`. It is the numerator of that
    score over V, and has its sign. It can be traced, differentiated and exported.

    Args:
        model: the transformer.

    Returns:
        `[L,H]`, in logits times the scales of norms.

    Example:
        >>> model, tokenizer = demo_model()
        >>> copying_traces(model).shape
        (4, 4)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    traces = jnp.trace(copying_cores(model, ov_matrices(model)), axis1=-2, axis2=-1)
    return traces / model.config.vocab_size


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class CopyingRanks(Record):
    """Where the token that a head reads stands among the logits that the head writes.

    Attributes:
        above: `[L,H]`, the mean share of the other tokens with a larger logit, equal ones by
            half: 0 if the token read is always first, 0.5 for a head without preference.
        first: `[L,H]`, the share of tokens that come out first, alone.
    """

    above: Float[Array, "L H"]
    first: Float[Array, "L H"]


def copying_ranks(model: Transformer, ids: Ids | None = None) -> CopyingRanks:
    """Whether every head raises the token it reads above all others: by rank, not by eigenvalues.

    Each token alone writes the logits `W_E W_OV W_U` through a head, folded as in
    `copying_scores`: the scales of norms do not change ranks. The biases are left out.

    Args:
        model: the transformer.
        ids: `[N]` token ids to average over; None for the whole vocabulary, V^2 logits a head.

    Returns:
        CopyingRanks of `[L,H]` arrays.

    Raises:
        TypeError, ValueError: ids that are not token ids `[N]`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> copying_ranks(model, np.arange(100, 200))
        CopyingRanks(above=float32[4, 4], first=float32[4, 4])

    Reference:
        Elhage et al. 2021, Olsson et al. 2022 for copying by the logits written.
    """
    config = model.config
    ids = np.arange(config.vocab_size) if ids is None else ids
    shape = np.shape(ids)
    if len(shape) != 1 or not shape[0]:
        got, do = f"shape {shape}", "give at least one in one axis"
        raise ValueError(expected("ids", "token ids `[N]`", got, do))
    return _ranks(model, ov_matrices(model), checked_ids(config, ids, shape, name="ids"))


@compiled()
def _ranks(model: Transformer, ov: Factored, ids: Int[Array, " N"]) -> CopyingRanks:
    u_VD = model.unembedding()
    if (norm := model.norm_final) is not None:
        u_VD = norm.transposed(u_VD)
    others = max(model.config.vocab_size - 1, 1)

    def of_head(head: Factored) -> CopyingRanks:
        written_KV = contract("KD,VD->KV", head.right, u_VD)  # once a head, not once a token

        def of_token(token: Array) -> tuple[Array, Array]:
            read_K = contract("D,DK->K", _embedded(model, model.w_e[...][token]), head.left)
            logits = contract("K,KV->V", read_K, written_KV)
            # Equal logits share their ranks: each counts half, the token itself not at all.
            larger, equal = (f(logits, logits[token]).sum() for f in (jnp.greater, jnp.equal))
            return (larger + (equal - 1) / 2) / others, larger + equal == 1

        above, first = jax.lax.map(of_token, ids, batch_size=_BATCH)
        dtype = u_VD.dtype
        return CopyingRanks(above=jnp.mean(above, dtype=dtype), first=jnp.mean(first, dtype=dtype))

    heads = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), ov)
    ranks = jax.lax.map(of_head, heads)
    return jax.tree.map(lambda x: x.reshape(ov.shape[:2]), ranks)


def _positive(cores: Float[Array, "L H K K"]) -> Float[Array, "L H"]:
    """The sum of eigenvalues over the sum of their absolute values; 0 without any."""
    values = eigenvalues(cores)
    # Eigenvalues of a real matrix come in conjugate pairs: the sum has no imaginary part.
    total = np.abs(values).sum(-1)
    score = values.sum(-1).real / np.where(total == 0, 1, total)
    return jnp.asarray(np.clip(score, -1, 1), cores.dtype)


@compiled()
def copying_cores(model: Transformer, ov: Factored) -> Float[Array, "L H K K"]:
    """`W_O W_U W_E W_V` of every head."""
    w_e = model.w_e[...]
    w_u = w_e if model.w_u is None else model.w_u[...].T
    # What surrounds the tables is linear: applied to the small product, it never meets V rows.
    between_MD = _embedded(model, _over_vocabulary(w_u, w_e))
    between_DD = between_MD * model.config.logit_scale
    if model.w_project_out is not None:
        between_DD = contract("DM,MN->DN", model.w_project_out[...], between_DD)
    if (norm := model.norm_final) is not None:
        between_DD = norm.transposed(between_DD.T).T
    return _core(ov, between_DD)


@compiled()
def matching_cores(model: Transformer, qk: Factored) -> Float[Array, "L H K K"]:
    """`W_K^T W_E^T W_E W_Q` of every head."""
    between_MM = _over_vocabulary(model.w_e[...], model.w_e[...])
    return _core(qk, _embedded(model, _embedded(model, between_MM).T))


def _core(matrix: Factored, between_DD: Array) -> Float[Array, "L H K K"]:
    """`right between left`, which has the nonzero eigenvalues of `left right between`."""
    read = contract("LHKD,DM->LHKM", matrix.right, between_DD)
    return contract("LHKM,LHMN->LHKN", read, matrix.left)


def _over_vocabulary(a_VM: Array, b_VN: Array) -> Float[Array, "M N"]:
    """`a^T b`, summed over a chunk of the vocabulary at a time."""
    # A product widens bfloat16 operands, so that all rows at once would be held in float32.
    size = a_VM.shape[0]
    whole = size - size % _CHUNK

    def add(total: Array, start: Array) -> tuple[Array, None]:
        a, b = (jax.lax.dynamic_slice_in_dim(x, start, _CHUNK) for x in (a_VM, b_VN))
        return total + contract("VM,VN->MN", a, b), None

    # The scan takes whole chunks; what is left begins the sum.
    rest = contract("VM,VN->MN", a_VM[whole:], b_VN[whole:])
    return jax.lax.scan(add, rest, jnp.arange(0, whole, _CHUNK))[0] if whole else rest


def _embedded(model: Transformer, x: Float[Array, "... M"]) -> Float[Array, "... D"]:
    """What rows of `w_e` become in the stream, times the scale of a norm of the embedding."""
    config = model.config
    x = x * jnp.asarray(config.embed_scale, config.dtype).astype(config.acc)
    if model.w_project_in is not None:
        x = contract("...M,MD->...D", x, model.w_project_in[...])
    norm = model.norm_embed
    return x if norm is None else norm.linear(x)
