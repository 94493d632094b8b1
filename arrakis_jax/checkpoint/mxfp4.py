"""MXFP4, in which gpt-oss stores its experts: blocks of 32 numbers of 4 bits, with one scale.

A tensor `X [E,cols,rows]` is stored as `X_blocks [E,rows,cols/32,16]`, two numbers in a byte, the
low four bits first, and `X_scales [E,rows,cols/32]`, powers of two (OCP Microscaling Formats 1.0).
"""

from functools import cache, partial

import numpy as np

from arrakis_jax.checkpoint.files import STORED, Tensor

# E2M1: what the last three bits of a number stand for; the first is the sign.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS, NAN = 127, 255  # of the scales, E8M0
WIDTH = 32  # of a block


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with what is stored in MXFP4 as the tensors that it stands for."""
    whole = dict(tensors)
    for name in tensors:
        x = name.removesuffix("_blocks")
        blocks, scales = tensors[name], tensors.get(f"{x}_scales")
        if x == name or scales is None or (blocks.stored, scales.stored) != ("U8", "U8"):
            continue
        if x in tensors:
            continue  # two spellings of one tensor: the packed one is left over
        if blocks.shape != (*scales.shape, WIDTH // 2) or len(scales.shape) != 3:
            continue  # and is left over, under its own name
        del whole[name], whole[scales.name]
        whole[x] = _tensor(x, blocks, scales)
    return whole


def dequantised(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers, exact in bfloat16, `[...,32 n]` of `blocks [...,n,16]` and `scales [...,n]`."""
    pairs = _table()[scales[..., None], blocks]
    return pairs.view(STORED["BF16"]).reshape(*scales.shape[:-1], -1)


def _tensor(x: str, blocks: Tensor, scales: Tensor) -> Tensor:
    n_experts, rows, n = scales.shape

    def expert(e: int) -> np.ndarray:
        return dequantised(blocks.read()[e], scales.read()[e]).T

    shape = (n * WIDTH, rows)
    parts = tuple(Tensor(x, "BF16", shape, partial(expert, e)) for e in range(n_experts))

    def whole() -> np.ndarray:
        return np.stack([part.read() for part in parts])

    return Tensor(x, "BF16", (n_experts, *shape), whole, parts)


@cache
def _table() -> np.ndarray:
    """Both numbers of every byte under every scale: uint32 `[256,256]`."""
    values = np.array([*FP4, *(-v for v in FP4)])
    low_high = np.stack([np.tile(values, 16), np.repeat(values, 16)], -1)
    with np.errstate(over="ignore"):  # of 2 and more times the largest scale
        scale = np.where(np.arange(256) == NAN, np.nan, np.ldexp(1.0, np.arange(256) - BIAS))
        pairs = (scale[:, None, None] * low_high).astype(STORED["BF16"])
    return pairs.view(np.uint32)[..., 0]
