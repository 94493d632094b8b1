"""Products with weights. They sum in at least float32; operands may be bfloat16 for speed."""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from arrakis_jax.core.axes import Array, over
from arrakis_jax.core.config import ModelConfig


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, config: ModelConfig) -> nnx.Param:
    """A weight drawn from a normal distribution with variance 1 / fan_in.

    In bfloat16 the distribution is an approximation, which draws billions of weights in seconds.
    """
    std = max(fan_in, 1) ** -0.5
    if config.dtype == "bfloat16":
        return nnx.Param(_sums_of_bytes(rngs.params(), shape=shape, std=std))
    return nnx.Param(rngs.params.normal(shape, config.dtype) * jnp.asarray(std, config.dtype))


@partial(jax.jit, static_argnames=("shape", "std"))
def _sums_of_bytes(key: Array, *, shape: tuple[int, ...], std: float) -> Array:
    """Sums of two random bytes, centred and scaled: within 2.5 std, excess kurtosis -0.6.

    Drawn layer by layer (the first of three or more axes), so that scratch memory stays small.
    """
    stacked = len(shape) > 2
    # `unsafe_rbg` is many times faster than JAX's default, and takes a key of four words.
    data = jnp.tile(jax.random.key_data(key).reshape(-1), 4)[:4]
    keys = jax.random.split(
        jax.random.wrap_key_data(data, impl="unsafe_rbg"), shape[0] if stacked else 1
    )
    block = shape[1:] if stacked else shape

    def draw(key: Array) -> Array:
        n = prod(block)
        bits = jax.random.bits(key, ((n + 1) // 2,), jnp.uint32)
        pairs = jax.lax.bitcast_convert_type(bits, jnp.uint16).reshape(-1)[:n].reshape(block)
        total = (pairs & 255) + (pairs >> 8)
        # A byte is uniform on 256 values: its mean is 127.5 and its variance (256^2 - 1) / 12.
        deviation = (2 * (256**2 - 1) / 12) ** 0.5
        return ((total.astype(jnp.float32) - 255) * (std / deviation)).astype(jnp.bfloat16)

    return jax.lax.map(draw, keys).reshape(shape) if prod(shape) else jnp.zeros(shape, jnp.bfloat16)


def writers(config: ModelConfig) -> int:
    """How many modules write to the stream. Their weights start smaller by its root (GPT-2)."""
    return max(2 * config.n_layers, 1)


def constant(shape: tuple[int, ...], value: float, config: ModelConfig) -> nnx.Param:
    """A bias (0) or a norm's gain (1)."""
    return nnx.Param(jnp.full(shape, value, config.dtype))


def product(spec: str, a: Array, b: Array, config: ModelConfig) -> Array:
    """`jnp.einsum` with operands in `config.operands` and the result in `config.acc`."""
    a, b = a.astype(config.operands), b.astype(config.operands)
    if config.operands == jnp.bfloat16:
        return _rounded(spec, a, b)
    return jnp.einsum(
        spec, a, b, precision=config.matmul_precision, preferred_element_type=config.acc
    )


# The operands are bfloat16; the sum is float32.
_einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(spec: str, a: Array, b: Array) -> Array:
    """A product in bfloat16, summed in float32. Cotangents are rounded to bfloat16 as well.

    JAX's own rule multiplies cotangents in float32, with widened weights. `spec` must not sum an
    axis that only one operand has, and has no ellipsis.
    """
    return _einsum(spec, a, b)


def _rounded_forward(spec: str, a: Any, b: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
    """The product, and each operand if the other one's gradient is asked for."""
    needed = (a.value if b.perturbed else None, b.value if a.perturbed else None)
    return _einsum(spec, a.value, b.value), needed


def _rounded_back(
    spec: str, needed: tuple[Array | None, Array | None], dy: Array
) -> tuple[Array | None, Array | None]:
    # The gradient of an einsum is an einsum: the cotangent takes the operand's place in the spec.
    in_a, in_b, out = spec.replace("->", ",").split(",")
    (a, b), dy = needed, dy.astype(jnp.bfloat16)
    da = None if b is None else _einsum(f"{out},{in_b}->{in_a}", dy, b).astype(b.dtype)
    db = None if a is None else _einsum(f"{out},{in_a}->{in_b}", dy, a).astype(a.dtype)
    return da, db


_rounded.defvjp(_rounded_forward, _rounded_back, symbolic_zeros=True)


def affine(spec: str, x: Array, w: nnx.Param, b: nnx.Param | None, config: ModelConfig) -> Array:
    """`x w + b`, or `x w` without a bias."""
    return _biased(product(spec, x, w[...], config=config), b)


def flat_affine(
    x: Array, w: nnx.Param, b: nnx.Param | None, config: ModelConfig, *, n_in: int = 1
) -> Array:
    """`affine` over the last `n_in` axes of `x [B,T,...]` and the first `n_in` axes of w.

    Flattened to a matrix product: on CPU, XLA copies a weight whose gradient sums several axes.
    """
    outer, n = x.shape[: x.ndim - n_in], prod(x.shape[x.ndim - n_in :])
    y = product("BTI,IO->BTO", x.reshape(*outer, n), w[...].reshape(n, -1), config=config)
    return _biased(y.reshape(*outer, *w[...].shape[n_in:]), b)


def _biased(y: Array, b: nnx.Param | None) -> Array:
    return y if b is None else y + over(b[...].astype(y.dtype), y)


def softcap(x: Array, cap: float | None) -> Array:
    """`cap tanh(x / cap)`, or `x` without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)
