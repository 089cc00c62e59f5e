"""The codec of FP8: float matrices to e4m3 codes with a scale for each block of 128 x 128, and back, in NumPy.

A weight is code * scale of its block, formed in float32 and rounded once. Blocks at the lower and right edges may be
smaller. Source: the layout of DeepSeek-V3, in which Qwen publishes its models; transformers 5.23, `Fp8Quantize` and
`Fp8Dequantize` in `integrations/finegrained_fp8.py`. Encoding gives the bits of `Fp8Quantize`, which leaves matrices
unquantised whose sides are no multiples of 128; here their last blocks are smaller, as its FP8 layers read them.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxmoe.parameters import FP8_BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448


class FP8(NamedTuple):
    """Matrices in FP8, any leading axes: codes e4m3 [..., out, in], scales [..., ceil(out / 128), ceil(in / 128)],
    float32 or bfloat16."""

    codes: np.ndarray
    scales: np.ndarray


def encode(matrix: np.ndarray) -> FP8:
    """Quantises float matrices [..., out, in]: the largest magnitude of a block becomes 448."""
    x = matrix.astype(np.float32)
    factors, scales = factors_and_scales(_largest(np.abs(x)))
    scaled = x * spread(factors, x.shape[-2:])
    return FP8(np.clip(scaled, -LARGEST, LARGEST).astype(E4M3), scales)


def factors_and_scales(largest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(what a block is multiplied by, its scale), float32, from the largest magnitude of each block; 1 for zeros.

    The scale is the rounded reciprocal of a rounded quotient, as transformers computes it.
    """
    some = largest > 0
    factors = np.where(some, LARGEST / np.where(some, largest, np.float32(1)), np.float32(1))
    return factors, np.float32(1) / factors


def _largest(x: np.ndarray) -> np.ndarray:
    """The largest element of each block."""
    for axis in (-2, -1):
        x = np.maximum.reduceat(x, np.arange(0, x.shape[axis], FP8_BLOCK), axis=axis)
    return x


def spread(grid: np.ndarray, sides: tuple[int, ...]) -> np.ndarray:
    """The values of blocks [..., rows, columns] at each element [..., out, in] of matrices with these sides."""
    for axis, side in zip((-2, -1), sides, strict=True):
        grid = np.repeat(grid, FP8_BLOCK, axis=axis).swapaxes(axis, -1)[..., :side].swapaxes(axis, -1)
    return grid


def decode(packed: FP8, dtype: np.dtype) -> np.ndarray:
    """The weights [..., out, in]: code times scale in float32, rounded to `dtype` once; one matrix at a time."""
    codes, scales = packed
    weights = np.empty(codes.shape, dtype)
    for place in np.ndindex(codes.shape[:-2]):
        for i, row in enumerate(scales[place].astype(np.float32)):
            rows = slice(i * FP8_BLOCK, (i + 1) * FP8_BLOCK)
            columns = np.repeat(row, FP8_BLOCK)[: codes.shape[-1]]
            weights[place][rows] = (codes[place][rows].astype(np.float32) * columns).astype(dtype)
    return weights
