"""Which tensor of a checkpoint is the first with NaN or infinity? A conversion says so, and keeps the value."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from convert.names import Row, rows
from jaxmoe.store.checkpoint import Block, Checkpoint

# dtype -> (bits, all of them but the sign, the least of those that is not finite). The bits of a bfloat16 are compared
# eight times as fast as `np.isfinite` converts it.
_NOT_FINITE = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
    "float8_e4m3fn": (np.uint8, 0x7F, 0x7F),
}
_STEP = 2**18  # bytes that are compared at a time, few enough to stay in a core's cache


def first_not_finite(array: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first NaN or infinity in `array`; None if there is none, or if its dtype has none."""
    if array.dtype.name not in _NOT_FINITE:
        return None
    unsigned, magnitude, least = _NOT_FINITE[array.dtype.name]
    bits = array.reshape(-1).view(unsigned)
    step = _STEP // bits.itemsize
    for start in range(0, bits.size, step):
        part = bits[start : start + step] & unsigned(magnitude)
        if part.max() >= least:
            return tuple(map(int, np.unravel_index(start + int((part >= least).argmax()), array.shape)))
    return None


def noticing(where: str, source: Checkpoint, on_block: Callable[[Block, int], None]) -> Callable[[Block, int], None]:
    """`on_block`, preceded by a notice at the first block of `source` that holds a value that is not finite."""
    noticed = False

    def check(block: Block, layers: int) -> None:
        nonlocal noticed
        if not noticed and (found := _found(source, block)) is not None:
            noticed = True
            key, value = found
            logging.getLogger("jaxmoe").warning(
                f"{where}: {key}: holds {value}, the first value that is not finite; the conversion goes on"
            )
        on_block(block, layers)

    return check


def _found(source: Checkpoint, block: Block) -> tuple[str, float] | None:
    """(the HF key of the first tensor of a block with a value that is not finite, that value)."""
    for path, array in block.arrays.items():
        if (index := first_not_finite(array)) is not None:
            keys = (row.key for row in rows(source.config, block.layer, source.layout) if _holds(row, path, index))
            return next(keys, path), float(array[index])
    return None


def _holds(row: Row, path: str, index: tuple[int, ...]) -> bool:
    """Whether an HF tensor holds this entry of the array `path`, which may be a part of a quantised weight."""
    plain = path in (row.path, f"{row.path}.weight", f"{row.path}.codes")
    if not plain and path.rpartition(".")[0] != row.path:
        return False
    if not row.part:
        return True
    if not plain:
        return row.matrix == index[:2]
    expert, height = row.part
    return expert == index[0] and isinstance(height, slice) and height.start <= index[1] < height.stop
