"""How the grouped matmul for Ampere and newer cards cuts its work, as plain numbers by compute capability."""

from __future__ import annotations

from typing import NamedTuple

from jaxmoe.ops.kernels.ampere import BARRIERS, BLOCK_RESERVE, ITEM, THREADS, card_of

TILE_ROWS = 16  # the unit of the row layout: a group's first row and its number of rows are multiples of it
HEIGHTS = (32, 64, 96, 112, 128)  # numbers of rows that there is code for; each costs time to compile
BLOCKS = 2  # thread blocks on a multiprocessor at a time


class Tiles(NamedTuple):
    """Tile sizes: `columns` of at most `rows` rows are computed at a time; a slot of the ring holds `depth` of the
    contraction."""

    rows: int
    columns: int
    depth: int
    slots: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block."""
        return self.slots * (self.rows + self.columns) * self.depth * ITEM + BARRIERS

    @property
    def accumulators(self) -> int:
        """Registers of a thread that hold sums."""
        return self.rows * self.columns // THREADS


def fits_registers(capability: tuple[int, int]) -> bool:
    """Whether a card's machine code has room for all sums of 128 rows and 128 columns beside what it multiplies.

    By ptxas 13.0, which spills registers in both programs from compute capability 10.0 on.
    """
    return capability < (10, 0)


def span_rows(capability: tuple[int, int]) -> int:
    """The limit for the rows of a span on this card."""
    return HEIGHTS[-1] if fits_registers(capability) else HEIGHTS[-2]


def column_tile(columns: int) -> int:
    """Columns of the result in one tile: the widest of 128, 64 and 32 that the result has."""
    return next(width for width in (128, 64, 32) if width <= columns)


def default_tiles(columns: int, depths: tuple[int, ...], capability: tuple[int, int]) -> Tiles:
    """Tiles with slots of 64 where the card has room for two, otherwise of 32.

    Measured on an H200 (docs/log): two slots of 64 are a third faster than four or five of 32. On other cards the rule
    is arithmetic.
    """
    card, rows = card_of(capability), span_rows(capability)
    room = min(card.shared // BLOCKS - BLOCK_RESERVE, card.block_shared) - BARRIERS
    deep = not any(depth % 64 for depth in depths)
    for depth in (64, 32) if deep else (32,):
        slots = room // ((rows + columns) * depth * ITEM)
        if slots >= 2:
            break
    return Tiles(rows, columns, depth, min(slots, 4))
