"""MXFP4, the format of gpt-oss' experts: blocks of 32 numbers of 4 bits, with one scale.

A tensor `X [E,cols,rows]` is stored as `X_blocks [E,rows,cols/32,16]`, two numbers in a byte, the
low four bits first, and `X_scales [E,rows,cols/32]`, powers of two (OCP Microscaling Formats 1.0).
"""

from functools import cache, partial

import numpy as np

from arrakis_jax.checkpoint.files import STORED, Tensor

# E2M1: the values of a number's last three bits; the first bit is the sign.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# E8M0: a scale s stands for 2 ** (s - bias); the last one is not a number.
_BIAS, _NAN = 127, 255
_WIDTH = 32  # numbers in a block


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, where each pair of blocks and scales becomes the tensor that it stores."""
    whole = dict(tensors)
    for name in tensors:
        x = name.removesuffix("_blocks")
        blocks, scales = tensors[name], tensors.get(f"{x}_scales")
        if x == name or scales is None or (blocks.stored, scales.stored) != ("U8", "U8"):
            continue
        if x in tensors:
            continue  # the tensor is stored twice: the packed one will be reported as left over
        if blocks.shape != (*scales.shape, _WIDTH // 2) or len(scales.shape) != 3:
            continue  # no MXFP4: it will be reported as left over, under its own name
        del whole[name], whole[scales.name]
        whole[x] = _tensor(x, blocks, scales)
    return whole


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers, exact in bfloat16, `[...,32 n]` of `blocks [...,n,16]` and `scales [...,n]`."""
    # One look-up gives the two numbers of a byte, as the two halves of a uint32.
    pairs = _table()[scales[..., None], blocks]
    return pairs.view(STORED["BF16"]).reshape(*scales.shape[:-1], -1)


def _tensor(x: str, blocks: Tensor, scales: Tensor) -> Tensor:
    n_experts, rows, n = scales.shape

    def expert(e: int) -> np.ndarray:
        return dequantised(blocks.read()[e], scales.read()[e]).T

    shape = (n * _WIDTH, rows)
    parts = tuple(Tensor(x, "BF16", shape, partial(expert, e)) for e in range(n_experts))

    def whole() -> np.ndarray:
        return np.stack([part.read() for part in parts])

    return Tensor(x, "BF16", (n_experts, *shape), whole, parts)


@cache
def _table() -> np.ndarray:
    """Both numbers of every byte under every scale: uint32 `[256,256]`."""
    values = np.array([*_FP4, *(-v for v in _FP4)])
    low_high = np.stack([np.tile(values, 16), np.repeat(values, 16)], -1)
    with np.errstate(over="ignore"):  # 2 and more times the largest scale is infinity
        scale = np.where(np.arange(256) == _NAN, np.nan, np.ldexp(1.0, np.arange(256) - _BIAS))
        pairs = (scale[:, None, None] * low_high).astype(STORED["BF16"])
    return pairs.view(np.uint32)[..., 0]
