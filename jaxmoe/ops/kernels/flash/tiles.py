"""How flash attention cuts its work on a card, as plain numbers."""

from __future__ import annotations

from typing import NamedTuple

from jaxmoe.ops.kernels.ampere import BARRIERS, ITEM, card_of

UNIT = 128  # the number of tokens is padded to a multiple of it, and so of every tile


class Tiles(NamedTuple):
    """One program's tiles: `rows` that a thread block owns, `walked` rows at a time, `slots` for the latter.

    Of the owned tiles the last `held` stay in registers, which saves reading them from shared memory at every step.
    """

    rows: int
    walked: int
    slots: int
    held: int = 0

    def shared_bytes(self, width: int, own: int) -> int:
        """Shared memory of a thread block that owns `own` tiles and walks along two."""
        return (own * self.rows + 2 * self.slots * self.walked) * width * ITEM + BARRIERS


class AttentionTiles(NamedTuple):
    """The tiles of the forward pass, of the gradient of the queries, and of those of keys and values."""

    forward: Tiles
    d_query: Tiles
    d_keys: Tiles

    def shared_bytes(self, width: int) -> int:
        """The most shared memory that a thread block of the three gets."""
        return max(
            self.forward.shared_bytes(width, 1), self.d_query.shared_bytes(width, 2), self.d_keys.shared_bytes(width, 2)
        )


# By head width. Two thread blocks share a multiprocessor, so a block has less than half its shared memory. Measured on
# an H200 (docs/log); those for less shared memory by arithmetic.
_NARROW = AttentionTiles(Tiles(128, 64, 2), Tiles(128, 32, 2, held=2), Tiles(64, 64, 2, held=2))
_LARGE = {64: _NARROW, 128: AttentionTiles(Tiles(128, 32, 2), Tiles(64, 32, 2, held=2), Tiles(64, 32, 2, held=1))}
_SMALL = {64: _NARROW, 128: AttentionTiles(Tiles(64, 32, 2), Tiles(64, 16, 2, held=2), Tiles(64, 16, 2, held=2))}
# From compute capability 10.0 on ptxas 13.0 spills registers of some of them; these need fewer.
_NEWER_LARGE = {64: _NARROW, 128: AttentionTiles(Tiles(64, 64, 2), Tiles(64, 32, 2, held=2), Tiles(64, 32, 2))}
_NEWER_SMALL = {64: _NARROW, 128: AttentionTiles(Tiles(64, 32, 2), Tiles(64, 16, 2, held=2), Tiles(64, 16, 2))}
BLOCKS = 2
WIDTHS = tuple(_LARGE)


def padded_width(head_dim: int) -> int:
    """The narrowest width with tiles that holds heads of `head_dim` numbers."""
    return next(width for width in WIDTHS if head_dim <= width)


def default_tiles(width: int, capability: tuple[int, int]) -> AttentionTiles:
    """The tiles for heads of this width on this card."""
    large, small = (_LARGE, _SMALL) if capability < (10, 0) else (_NEWER_LARGE, _NEWER_SMALL)
    return (large if card_of(capability).block_shared >= 160 * 1024 else small)[width]
