"""How the Hopper kernels cut their work: the sizes of tiles and the fastest sizes measured."""

from __future__ import annotations

from typing import NamedTuple

TILE_ROWS = 16  # the unit of the row layout: a group's first row and its number of rows are multiples of it
DEPTH = 64  # how much of the contraction one slot of the ring holds
SMALL, LARGE = 128, 256  # the two limits for the rows of a span
_SHARED_BYTES = 232_448 - 1024  # shared memory of a Hopper multiprocessor, less what the barriers need


class Tiles(NamedTuple):
    """Tile sizes of `grouped_matmul`.

    `columns` of the product are computed at a time. `heights` lists the numbers of rows that the kernel has code for,
    in rising order: a span is computed by the code of the next height, and no span may exceed the last. With a single
    height every span must be that high. `slots` is the length of the ring.
    """

    columns: int
    heights: tuple[int, ...]
    slots: int


class OuterTiles(NamedTuple):
    """Tile sizes of `grouped_outer`.

    `columns` of the result are computed at a time; `slots` is the length of the ring. Each multiplying warpgroup stages
    `pieces` of its result at a time; a piece is 64 rows of 128 bytes.
    """

    columns: int
    slots: int
    pieces: int


def default_tiles(columns: int, rows: int = SMALL, swiglu: bool = False) -> Tiles:
    """The fastest tiles measured for a product of `columns` columns and spans of at most `rows` rows (docs/log)."""
    # Each height costs time to compile. Most spans are slightly lower than the limit.
    heights = (96, 112, 128) if rows == SMALL else (192, 224, 240, 256)
    # 256 columns, unless the last tile would then be at least half empty.
    width = 256 if rows == SMALL and (swiglu or (columns - 1) % 256 >= 128) else 128
    slots = (_SHARED_BYTES - 2 * 128 * 128) // ((rows + width) * DEPTH * 2)
    return Tiles(width, heights, min(slots, 6))


def default_outer_tiles(columns: int, itemsize: int = 4) -> OuterTiles:
    """The fastest tiles measured for a result of `columns` columns of `itemsize` bytes.

    Four slots in the ring matter more than staging the whole result at once.
    """
    width = next(w for w in (256, 128, 64) if columns % w == 0 or w == 64)
    pieces = min(itemsize, width * itemsize // 128)
    slots = (_SHARED_BYTES - 2 * pieces * 64 * 128) // ((128 + width) * DEPTH * 2)
    return OuterTiles(width, min(slots, 6), pieces)
