"""The codec of NF4: float matrices to bytes and back, in NumPy, with the bytes of bitsandbytes.

A matrix is cut, in row-major order, into blocks of 64. A block is stored as its largest magnitude (absmax) and 4 bits
an element, an index into `NF4_TABLE`; a byte holds two, the even element in the high half. Double quantisation stores
absmax - mean(absmax) as 8-bit indices into `dynamic_map()`, in blocks of 256. Source: Dettmers et al. 2023 (QLoRA);
bitsandbytes 0.50, `functional.py` and `backends/default/ops.py`.

Decoding reproduces the bits of bitsandbytes for float32, bfloat16 and float16. Encoding reproduces the 4-bit codes and
the absmax of its CPU backend. For the second quantisation only decoding is the same: bitsandbytes' own 8-bit encoders
differ from each other (a table with 65,536 entries on a CPU, a search on CUDA), and so do their sums for the mean. This
encoder uses the exact mean and the nearest value. So quantise once and share the bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.parameters import NF4_BLOCK, NF4_NESTED_BLOCK

# the 16 values of NF4: quantiles of the normal distribution, exact zero, symmetric ends
NF4_TABLE = np.asarray(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
_SMALLEST = np.float32(1e-38)  # bitsandbytes' guard against a division by zero
_CHUNK = 1 << 16  # elements encoded at a time, so that the comparisons run in the cache


class NF4(NamedTuple):
    """Matrices in NF4, any leading axes; the nested fields are None where absmax is float32 itself.

    codes uint8 [..., elements / 2], absmax uint8 or float32 [..., blocks], nested_absmax float32 [..., blocks / 256],
    nested_offset float32 [...]; in NumPy or, from `jaxmoe.nf4.encode`, on a device.
    """

    codes: np.ndarray
    absmax: np.ndarray
    nested_absmax: np.ndarray | None = None
    nested_offset: np.ndarray | None = None

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], path: str) -> NF4:
        """The weight `path` out of a block's arrays, which are named as in `jaxmoe.parameters.stored_specs`."""
        nested = (arrays.get(f"{path}.{name}") for name in cls._fields[2:])
        return cls(arrays[f"{path}.codes"], arrays[f"{path}.absmax"], *nested)

    def named(self, path: str) -> dict[str, Any]:
        """The inverse of `of`: name -> array."""
        return {f"{path}.{name}": array for name, array in self._asdict().items() if array is not None}

    def matrix(self, index: tuple[int, ...]) -> NF4:
        """One of the matrices, by its place in the leading axes."""
        outer, offset = self.nested_absmax, self.nested_offset
        nested = (None if outer is None else outer[index], None if offset is None else offset[index])
        return NF4(self.codes[index], self.absmax[index], *nested)


@functools.cache
def dynamic_map() -> np.ndarray:
    """The 256 float32 values of the second quantisation, ascending, as bitsandbytes' `create_dynamic_map` returns them.

    Seven decades, from 1e-6 to 1, with 1, 2, ... 64 values of each sign (Dettmers 2016). The grid is rounded as
    torch.linspace rounds it: in float32, by fused multiply-add from the nearer end.
    """
    first, last = np.float32(0.1), np.float32(1)
    values = [np.asarray([0, 1], np.float32)]
    for decade in range(7):
        steps = 2**decade
        width = np.float64((last - first) / np.float32(steps))
        i = np.arange(steps + 1)
        grid = np.where(i < (steps + 1) // 2, first + width * i, last - width * (steps - i)).astype(np.float32)
        middle = (grid[:-1] + grid[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        values += [middle, -middle]
    return np.sort(np.concatenate(values))


def encode(matrix: np.ndarray, nested_quant_map: np.ndarray | None = None) -> NF4:
    """Quantises one float matrix of any shape; all of it is one sequence of blocks, the last of which may be short.

    Each element becomes the nearest value of the table, or the lower of two that are equally near. `nested_quant_map`,
    float32 [256] such as `dynamic_map()`, asks for double quantisation.
    """
    flat = np.ascontiguousarray(matrix).reshape(-1)
    absmax = np.empty(-(-flat.size // NF4_BLOCK), np.float32)
    codes = np.empty(-(-flat.size // 2), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float32)
        indices, maxima = _encode_chunk(part)
        codes[start // 2 : (start + _CHUNK) // 2] = indices[::2] << 4 | indices[1::2]
        absmax[start // NF4_BLOCK : (start + _CHUNK) // NF4_BLOCK] = maxima
    return NF4(codes, absmax) if nested_quant_map is None else NF4(codes, *_encode_absmax(absmax, nested_quant_map))


def _encode_chunk(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index into the table of each element, padded to an even number; absmax of each block)."""
    whole = x.size - x.size % NF4_BLOCK
    blocks = x[:whole].reshape(-1, NF4_BLOCK)
    absmax = np.abs(blocks).max(axis=1, initial=0)
    scaled = (blocks * (1 / np.maximum(absmax, _SMALLEST))[:, None]).reshape(-1)
    if whole < x.size:
        # bitsandbytes divides in a short block, where it multiplies by the reciprocal in a whole one
        last = np.maximum(np.abs(x[whole:]).max(), _SMALLEST)
        absmax, scaled = np.append(absmax, last), np.append(scaled, x[whole:] / last)
        if x.size % 2:
            scaled = np.append(scaled, np.float32(0))
    return _nearest(np.clip(scaled, -1, 1), NF4_TABLE), absmax


def _nearest(x: np.ndarray, table: np.ndarray) -> np.ndarray:
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    if table.size > 16:
        return np.searchsorted(bounds, x).astype(np.uint8)
    indices = np.zeros(x.shape, np.uint8)
    for bound in bounds:  # faster than a search when bounds are few
        indices += x > bound
    return indices


def _encode_absmax(absmax: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The second quantisation: (uint8 indices, absmax of each block of 256, offset)."""
    offset = mean(absmax)
    centred = absmax - offset
    starts = np.arange(0, centred.size, NF4_NESTED_BLOCK)
    outer = np.maximum.reduceat(np.abs(centred), starts)
    inverse = np.repeat(1 / np.maximum(outer, _SMALLEST), NF4_NESTED_BLOCK)[: centred.size]
    return _nearest(np.clip(centred * inverse, -1, 1), table), outer, offset


def mean(absmax: np.ndarray) -> np.ndarray:
    """The offset of the second quantisation: the mean in float64, as a float32 []."""
    return np.asarray(absmax.mean(dtype=np.float64), np.float32)


def decode_absmax(packed: NF4, nested_quant_map: np.ndarray | None) -> np.ndarray:
    """The absmax of every block, float32 [..., blocks]."""
    if packed.nested_absmax is None or packed.nested_offset is None:
        return packed.absmax
    assert nested_quant_map is not None
    outer = np.repeat(packed.nested_absmax, NF4_NESTED_BLOCK, axis=-1)[..., : packed.absmax.shape[-1]]
    return nested_quant_map[packed.absmax] * outer + packed.nested_offset[..., None]


def decode(packed: NF4, elements: int, dtype: np.dtype, nested_quant_map: np.ndarray | None = None) -> np.ndarray:
    """The weights [..., elements]: table value times absmax in float32, rounded to `dtype` once."""
    indices = np.stack([packed.codes >> 4, packed.codes & 15], axis=-1).reshape(*packed.codes.shape[:-1], -1)
    scale = np.repeat(decode_absmax(packed, nested_quant_map), NF4_BLOCK, axis=-1)
    return (NF4_TABLE[indices[..., :elements]] * scale[..., :elements]).astype(dtype)
