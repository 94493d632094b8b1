"""The matrices of a head's circuits, as two thin factors: what it moves (OV), what it seeks (QK).

Elhage et al. 2021. No D x D matrix is formed: everything comes from the factors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.core import Tracer
from jaxtyping import Complex

from arrakis_jax.core.axes import Array, Float, Int
from arrakis_jax.core.checks import checked_layer, host
from arrakis_jax.core.config import ModelConfig
from arrakis_jax.core.errors import expected
from arrakis_jax.core.numerics import contract
from arrakis_jax.forward.run import compiled
from arrakis_jax.nn.block import Block
from arrakis_jax.nn.context import AttentionContexts
from arrakis_jax.nn.norm import Norm
from arrakis_jax.nn.rotary import rotate
from arrakis_jax.nn.transformer import Transformer
from arrakis_jax.results.record import Record
from arrakis_jax.stream.padding import Padding

Distance = int | Int[Array, " N"] | np.ndarray | list


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, repr=False)
class Factored(Record):
    """A matrix of rank at most K, `left @ right`, that is never formed.

    With more axes in front it is many matrices: `f[layer, head]` is one of them.

    Attributes:
        left: `[...,D,K]`.
        right: `[...,K,D]`.

    Example:
        >>> model, tokenizer = demo_model()
        >>> ov = ov_matrices(model)
        >>> ov, ov[3, 1].singular_values().shape
        (Factored(left=float32[4, 4, 128, 64], right=float32[4, 4, 64, 128]), (64,))
    """

    left: Float[Array, "... D K"]
    right: Float[Array, "... K D"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the matrix would have."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def transposed(self) -> "Factored":
        """The transposed matrix, `right^T left^T`."""
        return Factored(
            left=jnp.swapaxes(self.right, -1, -2), right=jnp.swapaxes(self.left, -1, -2)
        )

    @property
    def core(self) -> Float[Array, "... K K"]:
        """`right @ left`, which has the matrix's trace and nonzero eigenvalues."""
        self._need_square()
        return contract("...KD,...DM->...KM", self.right, self.left)

    def frobenius(self) -> Float[Array, "..."]:
        """The Frobenius norm, the root of the sum of squared entries."""
        return jnp.linalg.norm(self._between()[1], axis=(-2, -1))

    def singular_values(self) -> Float[Array, "... K"]:
        """The min(D, K) singular values that may differ from zero, in descending order."""
        return jnp.linalg.svd(self._between()[1], compute_uv=False)

    def svd(
        self,
    ) -> tuple[Float[Array, "... D K"], Float[Array, "... K"], Float[Array, "... K D"]]:
        """`(u, s, vt)` with `u * s @ vt` the matrix: both factors' QR, then the SVD of K x K."""
        (before, after), middle = self._between()
        u, s, vt = jnp.linalg.svd(middle, full_matrices=False)
        vt = contract("...MK,...DK->...MD", vt, after)
        return contract("...DK,...KM->...DM", before, u), s, vt

    def trace(self) -> Float[Array, "..."]:
        """The trace, the sum of the eigenvalues."""
        self._need_square()
        return contract("...DK,...KD->...", self.left, self.right)

    def eigenvalues(self) -> Complex[np.ndarray, "... K"]:
        """The eigenvalues of `core`, complex: all that may differ from zero.

        Computed in numpy on the host for all matrices at once, because JAX has no eigenvalues of
        nonsymmetric matrices on every platform. So this cannot be traced or exported.

        Raises:
            TypeError: inside of jit, vmap or grad.
        """
        return eigenvalues(self.core)

    def expand(self, byte_limit: int = 2**31) -> Float[Array, "... D D"]:
        """The matrix itself.

        Raises:
            ValueError: if it takes more than `byte_limit` bytes.
        """
        acc = jnp.promote_types(jnp.result_type(self.left, self.right), jnp.float32)
        size = prod(self.shape) * acc.itemsize
        if size > byte_limit:
            must, do = (
                f"at least the {size} bytes of {list(self.shape)}",
                "select fewer, or raise it",
            )
            raise ValueError(expected("byte_limit", must, byte_limit, do))
        return contract("...DK,...KM->...DM", self.left, self.right)

    def __getitem__(self, index: Any) -> "Factored":
        """Some of the matrices: an index into the axes before `D`."""
        axes = self.left.shape[:-2]
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(index)):
            try:
                np.broadcast_to(np.zeros((), bool), axes)[index]
            except IndexError:
                do = "only axes before D and K can be indexed"
                raise IndexError(expected("index", f"within {list(axes)}", index, do)) from None
        return jax.tree.map(lambda factor: factor[index], self)

    def __matmul__(self, other: "Factored") -> "Factored":
        """The product of two, factored again, with the smaller K of the two."""
        if not isinstance(other, Factored):
            do = "multiply an array by `left` and `right` in turn"
            raise TypeError(expected("other", "Factored", type(other).__name__, do))
        if self.shape[-1] != other.shape[-2]:
            do = "both must be of one width"
            got = f"{list(self.shape)} @ {list(other.shape)}"
            raise ValueError(expected("other", f"of {self.shape[-1]} rows", got, do))
        inner = contract("...KD,...DM->...KM", self.right, other.left)
        if inner.shape[-2] <= inner.shape[-1]:
            left, right = self.left, contract("...KM,...MD->...KD", inner, other.right)
        else:
            left, right = contract("...DK,...KM->...DM", self.left, inner), other.right
        axes = inner.shape[:-2]
        return Factored(
            left=jnp.broadcast_to(left, (*axes, *left.shape[-2:])),
            right=jnp.broadcast_to(right, (*axes, *right.shape[-2:])),
        )

    def _between(self) -> tuple[tuple[Array, Array], Array]:
        """Orthonormal bases of columns and rows, and the matrix between them, `[...,K,K]`."""
        acc = jnp.promote_types(jnp.result_type(self.left, self.right), jnp.float32)
        before, left = jnp.linalg.qr(self.left.astype(acc))
        after, right = jnp.linalg.qr(jnp.swapaxes(self.right, -1, -2).astype(acc))
        return (before, after), contract("...MK,...NK->...MN", left, right)

    def _need_square(self) -> None:
        if self.shape[-1] != self.shape[-2]:
            do = "leave out the row of biases"
            got = f"{list(self.shape[-2:])}"
            raise ValueError(expected("matrix", "square to have eigenvalues", got, do))


def eigenvalues(core: Float[Array, "... K K"]) -> Complex[np.ndarray, "... K"]:
    """The eigenvalues of many matrices, in float64 on the host."""
    if isinstance(core, Tracer):
        do = "call it outside of jit, vmap and grad: eigenvalues are computed on the host"
        raise TypeError(expected("matrix", "made of numbers", "a traced array", do))
    return np.linalg.eigvals(np.asarray(core, np.float64))


def ov_matrices(model: Transformer, *, fold: bool = True, biases: bool = False) -> Factored:
    """What every head moves: `W_V W_O`, from the source's normed stream to what it writes.

    Head h writes `sum_j pattern[i,j] (x_j / s_j) left right` at position i, where s is the scale
    of the norm before attention (1 without one). `left` is `W_V` of the head's key/value head, so
    that heads of a group share it, and `right` is `W_O`.

    Args:
        model: the transformer, whose weights are not changed.
        fold: fold in what surrounds the weights. Into the rows of `W_V` the gain of the norm
            before attention, and its centring (LayerNorm). Into the columns of `W_O` centring and
            gain of a norm of attention's output or, with `norm_placement="stream_after"`, of the
            norm of the stream that follows, and `residual_scale`. Not the norms' scales, which
            depend on the text: multiply by those of a captured stream. False: weights as they are.
        biases: append a row to `left`, so that it takes `[x / s, 1]`: the norm's bias through
            `W_V`, plus `b_V`. The output's bias belongs to no head and is left out.

    Returns:
        Factored `[L,H,D,K]` (with biases `[L,H,D+1,K]`) and `[L,H,K,D]`, in float32 or wider.
        `clip_qkv` is ignored.

    Example:
        >>> model, tokenizer = demo_model()
        >>> ov_matrices(model)
        Factored(left=float32[4, 4, 128, 64], right=float32[4, 4, 64, 128])

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    return _ov(model, fold=bool(fold), biases=bool(biases))


@compiled("fold", "biases")
def _ov(model, *, fold, biases):
    return _each_layer(model, ov_of(model.config, fold=fold, biases=biases))


Head = tuple[int | Int[Array, ""], int | Int[Array, ""]]
OfLayer = Callable[[Block, Array], Factored]


def ov_of(config: ModelConfig, *, fold: bool, biases: bool) -> OfLayer:
    """`ov_matrices` of one layer, from its block and its index: `[H,D,K]` and `[H,K,D]`."""
    repeats = config.n_heads // config.n_kv_heads

    def of(block: Block, _: Array) -> Factored:
        norm = block.norm_attn if fold and config.norm_placement != "stream_after" else None
        w_v = _through(norm, block.attn.w_v[...], block.attn.b_v, biases=biases)
        w_o = block.attn.w_o[...].astype(config.acc)
        if fold:
            last = block.norm_attn if config.norm_placement == "stream_after" else None
            for written in (block.norm_attn_out, last):
                w_o = w_o if written is None else written.gained(written.centre(w_o))
            w_o = w_o * config.residual_scale
        return Factored(left=repeat(w_v, "D G K -> (G R) D K", R=repeats), right=w_o)

    return of


def qk_matrices(
    model: Transformer, *, distance: Distance = 0, fold: bool = True, biases: bool = False
) -> Factored:
    """What every head seeks: `W_Q R W_K^T`, from query stream to key stream.

    The score of the query at position i and the key at j, `distance = i - j` before it, is
    `(x_i / s_i) left right (x_j / s_j)^T`, with s the scale of the norm before attention. What
    multiplies scores after that is left out: the attention scale, a soft-cap, ALiBi's bias.
    R is RoPE's rotation over that distance, as each layer has it, `attention_factor` squared
    included; partial rotary leaves the other dimensions alone. Without RoPE R is the identity.

    Args:
        model: the transformer, whose weights are not changed.
        distance: i - j, an int >= 0, or several, `[N]`, over which the matrix is averaged. New
            values do not recompile.
        fold: fold in the norm before attention, as `ov_matrices` does, and the gain and centring
            of a norm of queries and keys (`qk_norm`). With that norm scores are not bilinear:
            divide by its scales as well, `norm_q_scale` at i and `norm_k_scale` at j. False:
            weights as they are, and RoPE.
        biases: append a row to `left` and a column to `right`, so that they take `[x / s, 1]`:
            the norm's bias through `W_Q`, plus `b_Q`, and the same of the keys. Scores with the
            scales of a captured stream are then exact.

    Returns:
        Factored `[L,H,D,K]` and `[L,H,K,D]` (with biases D + 1), in float32 or wider. `clip_qkv`
        is ignored. Scalings of RoPE that depend on the length of the text ("dynamic", "longrope")
        are those of a text of `max(distance) + 1` tokens.

    Raises:
        TypeError, ValueError: a distance that is not an integer, or negative; biases of a model
            whose norm of queries and keys has a bias itself (no such row can tell it).

    Example:
        >>> model, tokenizer = demo_model()
        >>> qk_matrices(model, distance=1).frobenius().shape
        (4, 4)

    Reference:
        Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
    """
    distance = checked_distance(distance)
    norms = [block.attn.norm_q for block, _ in model.stacks()]
    if biases and fold and any(norm is not None and norm.b is not None for norm in norms):
        do = "leave biases out, or fold=False"
        got = "True, and biases in its norm of queries and keys"
        raise ValueError(expected("biases", "False for this model", got, do))
    return _qk(model, distance, fold=bool(fold), biases=bool(biases))


def checked_distance(distance: Any) -> Array:
    """Distances `[N]` of a query to a key before it."""
    try:
        array = distance if isinstance(distance, jax.Array) else np.asarray(distance)
    except ValueError:
        array = np.asarray(None)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        do = "count positions from the key to the query"
        raise TypeError(expected("distance", "an int, or ints `[N]`", repr(distance), do))
    if array.ndim > 1 or array.size == 0:
        got, do = f"shape {array.shape}", "give one, or several to average over"
        raise ValueError(expected("distance", "an int, or ints `[N]`", got, do))
    values = host(array)
    if values is not None and (values < 0).any():
        do = "attention is causal: a query reads keys at or before it"
        raise ValueError(expected("distance", "at least 0", int(values.min()), do))
    return jnp.asarray(array, jnp.int32).reshape(-1)


@compiled("fold", "biases")
def _qk(model, distance, *, fold, biases):
    return _each_layer(model, qk_of(model.config, distance, fold=fold, biases=biases))


def qk_of(config: ModelConfig, distance: Array, *, fold: bool, biases: bool) -> OfLayer:
    """`qk_matrices` of one layer, from its block and its index."""
    repeats = config.n_heads // config.n_kv_heads
    turn = _turns(config, distance)

    def of(block: Block, layer: Array) -> Factored:
        attn = block.attn
        norm = block.norm_attn if fold and config.norm_placement != "stream_after" else None
        q = _through(norm, attn.w_q[...], attn.b_q, biases=biases)
        k = _through(norm, attn.w_k[...], attn.b_k, biases=biases)
        if fold and attn.norm_q is not None and attn.norm_k is not None:
            q = attn.norm_q.gained(attn.norm_q.centre(q))
            k = attn.norm_k.gained(attn.norm_k.centre(k))
        if turn is not None:
            ahead, still = turn(layer)
            q = rotate(q, *ahead, interleaved=config.rope_interleaved)
            k = rotate(k, *still, interleaved=config.rope_interleaved)
        left, right = rearrange(q, "D H K -> H D K"), repeat(k, "D G K -> (G R) K D", R=repeats)
        return Factored(left=left, right=right)

    return of


def _turns(config: ModelConfig, distance: Array) -> Callable | None:
    """The mean rotation over these distances and that over none, of each layer; each `[1,K/2]`."""
    position = jnp.append(distance, 0)[None]
    padding = Padding(None, position, position.max(-1) + 1)
    contexts = AttentionContexts.of(config, padding)
    if contexts.rotations is None:
        return None

    def turn(layer: Array) -> tuple[list[Array], list[Array]]:
        rotation = contexts.at(layer).rotation
        assert rotation is not None
        return [jnp.mean(x[:, :-1], 1) for x in rotation], [x[:, -1] for x in rotation]

    return turn


def _through(norm: Norm | None, w_DNK: Array, bias: Any, *, biases: bool) -> Float[Array, "D N K"]:
    """Weights that read the stream over its norm's scale; with biases in a last row, D + 1."""
    acc = jnp.promote_types(w_DNK.dtype, jnp.float32)
    w_NKD = rearrange(w_DNK.astype(acc), "D N K -> N K D")
    row_NK = jnp.zeros(w_NKD.shape[:2], acc) if bias is None else bias[...].astype(acc)
    if norm is not None:
        if norm.b is not None:
            row_NK = row_NK + contract("NKD,D->NK", w_NKD, norm.b[...])
        w_NKD = norm.centre(norm.gained(w_NKD))
    w_DNK = rearrange(w_NKD, "N K D -> D N K")
    return jnp.concatenate([w_DNK, row_NK[None]]) if biases else w_DNK


def checked_head(model: Transformer, head: Any, name: str = "head") -> Head:
    """A head as (layer, index), each counted from 0 or traced.

    Raises:
        ValueError: for what is not a pair.
        IndexError: if there is no such layer or head.
    """
    if not isinstance(head, tuple | list) or len(head) != 2:
        do = "name a head by its layer and its index"
        raise ValueError(expected(name, "(layer, head)", repr(head), do))
    config = model.config
    return (
        checked_layer(head[0], config.n_layers, name=f"{name}[0]"),
        checked_layer(head[1], config.n_heads, name=f"{name}[1]"),
    )


def of_head(model: Transformer, of: OfLayer, layer: Array, head: Array) -> Factored:
    """A function of one layer's block, at one layer and head: no other layer's are made."""
    found = None
    for blocks, layers in model.stacks():
        row = jnp.clip(layer - layers.start, 0, len(layers) - 1)
        block = jax.tree.map(
            lambda w, row=row: jax.lax.dynamic_index_in_dim(w, row, keepdims=False), blocks
        )
        own, here = of(block, layer)[head], layer >= layers.start
        found = own if found is None else jax.tree.map(partial(jnp.where, here), own, found)
    assert found is not None
    return found


def _each_layer(model: Transformer, of: OfLayer) -> Factored:
    """A function of one layer's block, over all layers."""
    found = [
        jax.vmap(of)(blocks, jnp.arange(layers.start, layers.stop))
        for blocks, layers in model.stacks()
    ]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *found)
