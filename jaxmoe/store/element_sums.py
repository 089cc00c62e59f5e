"""A checksum of an array that parts of it add up to, however it is cut.

Processes that share an array each add up what they hold, so that no process needs the whole; the result does not depend
on how many they are. Every element gives 64 bits that depend on its value and its place, by the finalizer of splitmix64
(Steele, Lea and Flood 2014); their sum modulo 2^64 changes with any element, and when elements change places.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PREFIX = "sum:"  # before such a checksum, to tell it from SHA-256
_TOGETHER = 2**20  # elements at a time: the working arrays have 8 bytes for each
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)


def sum_of_part(part: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """What `part` adds to the checksum of an array of `shape`, in which it begins at the indices `start`."""
    strides = [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
    if not part.ndim:
        part, start, strides = part[None], (0,), [1]
    bits = np.ascontiguousarray(part).view(f"u{part.dtype.itemsize}")
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda piece: _sum(piece[0], piece[1], strides), _pieces(bits, tuple(start)))
        return sum(sums) % 2**64


def checksum_of(sums: Iterable[int]) -> str:
    """The checksum of the array that has parts of these sums."""
    return f"{PREFIX}{sum(sums) % 2**64:016x}"


def _pieces(bits: np.ndarray, start: tuple[int, ...]) -> Iterable[tuple[np.ndarray, tuple[int, ...]]]:
    """(part of `bits` of moderate size, where it begins)."""
    rows = max(1, _TOGETHER * len(bits) // max(bits.size, 1))
    for first in range(0, len(bits), rows):
        piece, at = bits[first : first + rows], (start[0] + first, *start[1:])
        if piece.size <= _TOGETHER or piece.ndim == 1:
            yield piece, at
        else:  # one row, which is too large
            for inner, place in _pieces(piece[0], at[1:]):
                yield inner[None], (at[0], *place)


def _sum(bits: np.ndarray, start: Sequence[int], strides: Sequence[int]) -> int:
    axes = zip(start, bits.shape, strides, strict=True)
    places = [np.arange(first, first + size, dtype=np.uint64) * np.uint64(stride) for first, size, stride in axes]
    hashed = np.zeros(bits.shape, np.uint64)
    for axis, place in enumerate(places):
        hashed += place.reshape([-1 if axis == each else 1 for each in range(bits.ndim)])
    hashed *= _STEP
    hashed += bits
    for shift, factor in _MIX:
        hashed ^= hashed >> shift
        hashed *= factor
    hashed ^= hashed >> np.uint64(31)
    return int(hashed.sum(dtype=np.uint64))
