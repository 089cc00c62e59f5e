"""What the kernels that pass once over rows share: tiles in registers, of which a thread holds 16 bytes in a row.

A thread block is one warpgroup. Its four warps share the rows of a tile, so a sum over a row stays within a warp.
"""

from __future__ import annotations

from typing import Any

from jax import lax
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

plgpu: Any = mosaic_gpu  # untyped: jax 0.10 lacks much of it

VECTOR = 8  # neighbours that a thread holds: 16 bytes of numbers in 16 bits
_LANES, _WARPS = 32, 4
WIDEST = VECTOR * _LANES  # columns of a tile


def rows_of(columns: int) -> int:
    """The rows of a tile with so many columns, a power of two."""
    return _WARPS * _LANES * VECTOR // columns


def layout(columns: int, vector: int = VECTOR) -> Any:
    """How a tile [rows_of(columns), columns] lies in registers.

    With another `vector`, the neighbours that a thread holds, the tile has as many more or fewer columns.
    """
    rows = rows_of(columns * VECTOR // vector)
    if rows == _WARPS:  # a warp has one row
        tiling, warps, lanes = plgpu.Tiling(((rows, columns), (vector,))), (-3,), (-2,)
    else:
        tiling = plgpu.Tiling(((rows, columns), (rows // _WARPS, columns), (vector,)))
        warps, lanes = (-5,), (-3, -2)
    return plgpu.Layout.TILED(tiling, warp_dims=warps, lane_dims=lanes, vector_dim=-1)


def load(ref: Any, columns: int, axis: int | None = None) -> Array:
    """A tile; or numbers of which there is one for each of its rows (axis 0) or columns (axis 1)."""
    form = layout(columns)
    return plgpu.load(ref, layout=form if axis is None else form.reduce(1 - axis), optimized=False)


def across(numbers: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A tile whose rows (axis 0) or columns (axis 1) are these numbers."""
    return plgpu.layout_cast(lax.broadcast_in_dim(numbers, shape, (axis,)), layout(shape[1]))
