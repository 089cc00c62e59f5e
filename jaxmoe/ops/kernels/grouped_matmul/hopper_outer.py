"""The program of `hopper.grouped_outer`: producer, consumer and epilogue. `hopper.py` explains how they work together.

An item of work is one tile of one group's result. The contraction runs over the group's rows: each step of the ring
covers DEPTH of them. A group without rows needs no step, and its result is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import (
    CONSUMERS,
    Ring,
    launch,
    run_warpgroups,
    shared_memory,
    swizzle_bytes,
)
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import DEPTH, TILE_ROWS, OuterTiles

_UNITS = DEPTH // TILE_ROWS  # units of rows in a slot


@dataclass(frozen=True)
class OuterPlan:
    """What is known about a call when it is compiled.

    Attributes:
        rows: of `left` and `right`.
        left_columns: of `left`, a multiple of 64.
        right_columns: of `right`.
        groups: their number.
        tiles: how the work is cut.
    """

    rows: int
    left_columns: int
    right_columns: int
    groups: int
    tiles: OuterTiles

    @property
    def tile_rows(self) -> int:
        """Rows of the result (columns of `left`) in one item, 64 or 128.

        With 128 each consumer computes 64 of them. A narrow `left` (an adapter's rank) has only 64: then each consumer
        computes half of the columns.
        """
        return 64 if self.left_columns == 64 else 128

    @property
    def own_columns(self) -> int:
        """Columns of the result that one consumer computes."""
        return self.tiles.columns if self.tile_rows == 128 else self.tiles.columns // CONSUMERS

    @property
    def column_tiles(self) -> int:
        """Items across the result."""
        return pl.cdiv(self.right_columns, self.tiles.columns)

    @property
    def grid(self) -> tuple[int, int]:
        """Groups, and items of each."""
        return self.groups, pl.cdiv(self.left_columns, self.tile_rows) * self.column_tiles


@dataclass(frozen=True)
class _Program:
    """One thread block. `left_memory`, `right_memory` and `staging` are its shared memory."""

    plan: OuterPlan
    first: Any
    count: Any
    left: Any
    right: Any
    out: Any
    left_memory: Any
    right_memory: Any
    staging: Any
    ring: Ring
    warpgroup: Array

    def produce(self) -> None:
        """The producer: for each item, copies the group's rows of both operands into the ring, step by step."""

        def item(group: Array, row: Array, column: Array, start: Array) -> Array:
            first, count = self.first[group], self.count[group]
            steps = _steps(count)

            @pl.loop(0, steps)
            def _step(k: Array) -> None:
                slot = self.ring.wait_until_free(start + k)
                filled = self.ring.filled.at[slot]
                for n in range(_UNITS):
                    unit = k * _UNITS + n
                    # Past the group's end the copy asks for a row that does not exist, and TMA fills in zeros.
                    rows = pl.ds(jnp.where(unit < count, (first + unit) * TILE_ROWS, self.plan.rows), TILE_ROWS)
                    part = slot, pl.ds(n * TILE_ROWS, TILE_ROWS)
                    left = self.left.at[rows, pl.ds(row, self.plan.tile_rows)]
                    right = self.right.at[rows, pl.ds(column, self.plan.tiles.columns)]
                    plgpu.copy_gmem_to_smem(left, self.left_memory.at[part], filled)
                    plgpu.copy_gmem_to_smem(right, self.right_memory.at[part], filled)

            return start + steps

        self.ring.drain(self._for_each_item(item))

    def consume(self) -> None:
        """A consumer: for each item, computes its part of the tile and hands it to the epilogue."""
        narrow = self.plan.tile_rows == 64
        own_row, own_column = (0, self.warpgroup * self.plan.own_columns) if narrow else (self.warpgroup * 64, 0)

        def item(group: Array, row: Array, column: Array, start: Array) -> Array:
            steps = _steps(self.count[group])

            def accumulate(acc: Any) -> Array:
                def multiply_slot(slot: Array) -> None:
                    left = self.left_memory.at[slot].at[:, pl.ds(own_row, 64)].transpose((1, 0))
                    right = self.right_memory.at[slot].at[:, pl.ds(own_column, self.plan.own_columns)]
                    plgpu.wgmma(acc, left, right)

                self.ring.multiply(start, steps, multiply_slot, in_flight=1)
                return acc[...]

            acc = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((64, self.plan.own_columns), jnp.float32))

            @pl.when(steps > 0)
            def _release_last() -> None:
                self.ring.arrive(start + steps - 1)

            self._epilogue(acc, group, row + own_row, column + own_column)
            return start + steps

        self._for_each_item(item)

    def _epilogue(self, acc: Array, group: Array, row: Array, column: Array) -> None:
        """Rounds the sums and writes them to out[group, row:, column:] through shared memory, some pieces at a time."""
        out, staging = self.out.at[group], self.staging.at[self.warpgroup]
        pieces, height, width = staging.shape
        rows = min(height, out.shape[0])  # the result may have fewer: an adapter's rank
        result = acc.astype(out.dtype)
        # A piece past the end of `out` is left out. TMA would drop it, except where `out` is only one piece wide: there
        # Mosaic removes that dimension of size one and with it the piece's position. It would overwrite the first.
        across = range(0, min(acc.shape[1], out.shape[-1]), width)
        corners = [(i, j) for i in range(0, acc.shape[0], height) for j in across]

        def write() -> None:
            for start in range(0, len(corners), pieces):
                together = list(enumerate(corners[start : start + pieces]))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for buffer, (i, j) in together:
                    staging[buffer] = result[i : i + height, j : j + width]
                plgpu.commit_smem()
                for buffer, (i, j) in together:
                    place = pl.ds(row + i, rows), pl.ds(column + j, width)
                    plgpu.copy_smem_to_gmem(staging.at[buffer, pl.ds(0, rows)], out.at[place])

        # Of two consumers that share the columns of a narrow `out`, only the first one writes.
        pl.when(column == 0)(write) if out.shape[-1] == width else write()

    def _for_each_item(self, item: Callable[[Array, Array, Array, Array], Array]) -> Any:
        """Calls `item(group, row, column, step)` for this multiprocessor's items.

        `step` is the item's first step of the ring; each call returns that of the next, and the last is returned.
        """
        across = jnp.int32(self.plan.column_tiles)

        @plgpu.nd_loop(self.plan.grid, collective_axes="sm", init_carry=jnp.int32(0))
        def _item(info: Any, carry: Array) -> Array:
            group, tile = info.index
            row, column = lax.div(tile, across) * self.plan.tile_rows, lax.rem(tile, across) * self.plan.tiles.columns
            return item(group, row, column, carry)

        return _item


def _steps(units: Array) -> Array:
    """Steps of the ring for this many rows, in units of 16."""
    return lax.div(units + (_UNITS - 1), jnp.asarray(_UNITS, units.dtype))


def run(
    plan: OuterPlan,
    operands: tuple[Array, Array],
    place: tuple[Int[Array, " E"], Int[Array, " E"]],
    out: jax.ShapeDtypeStruct,
    interpret: Any,
) -> Float[Array, "E a c"]:
    """Launches the kernel; `hopper.grouped_outer` has checked the operands. `place`: first row and number of rows."""

    def program(refs: tuple[Any, ...], ring: Ring) -> None:
        warpgroup = lax.axis_index("wg")
        first, count, left, right, out, *memory = refs
        left_memory, right_memory, staging = memory
        block = _Program(plan, first, count, left, right, out, left_memory, right_memory, staging, ring, warpgroup)
        run_warpgroups(block.produce, block.consume, warpgroup)

    left, right = operands
    itemsize = jnp.dtype(out.dtype).itemsize
    piece = math.gcd(out.shape[-1], 128 // itemsize)
    swizzle = swizzle_bytes(plan.left_columns, plan.right_columns)
    scratch = [
        shared_memory((plan.tiles.slots, DEPTH, plan.tile_rows), left.dtype, swizzle),
        shared_memory((plan.tiles.slots, DEPTH, plan.tiles.columns), left.dtype, swizzle),
        shared_memory((CONSUMERS, plan.tiles.pieces, 64, piece), out.dtype, piece * itemsize),
    ]
    copies = 2 * _UNITS
    kernel = launch("grouped_outer", program, out, scratch, slots=plan.tiles.slots, copies=copies, interpret=interpret)
    return kernel(*place, left, right)
