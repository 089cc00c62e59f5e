"""The program of `ampere.grouped_outer`: an item of work is one tile of one group's result."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxmoe.ops.kernels.ampere import copy, launch, pipelined, shared_memory, store
from jaxmoe.ops.kernels.grouped_matmul.ampere_block import grid, item_of, multiply, sums_of, turns
from jaxmoe.ops.kernels.grouped_matmul.ampere_tiles import TILE_ROWS

_UNITS = 4  # units of rows in a slot


@dataclass(frozen=True)
class OuterPlan:
    """What is known about a call when it is compiled: the operands' sizes, and those of a tile of the result.

    `unrolled`: there is code for each unit of rows in a slot. It needs more registers than one code for all.
    """

    rows: int
    left_columns: int
    right_columns: int
    groups: int
    tile_rows: int
    tile_columns: int
    slots: int
    unrolled: bool

    @property
    def across(self) -> int:
        """Tiles beside each other."""
        return pl.cdiv(self.right_columns, self.tile_columns)

    @property
    def tiles(self) -> int:
        """Tiles of one group's result."""
        return pl.cdiv(self.left_columns, self.tile_rows) * self.across


class _Item(NamedTuple):
    """A group's first row and its number of rows, in units of 16, the group, and the place of the tile."""

    first: Array
    count: Array
    group: Array
    row: Array
    column: Array


@dataclass(frozen=True)
class _Program:
    """One thread block. `left_memory` and `right_memory` are its shared memory."""

    plan: OuterPlan
    first: Any
    count: Any
    left: Any
    right: Any
    out: Any
    left_memory: Any
    right_memory: Any

    def run(self) -> None:
        """Computes all items of this thread block."""

        @pl.loop(0, turns(self.plan.groups * self.plan.tiles))
        def _turn(turn: Array) -> None:
            self._item(item_of(turn))

    def _item(self, number: Array) -> None:
        plan = self.plan
        group, tile = lax.div(number, jnp.int32(plan.tiles)), lax.rem(number, jnp.int32(plan.tiles))
        down, across = lax.div(tile, jnp.int32(plan.across)), lax.rem(tile, jnp.int32(plan.across))
        # The last tiles begin where they fit, and compute some of the result once more.
        row = jnp.minimum(down * plan.tile_rows, plan.left_columns - plan.tile_rows)
        column = jnp.minimum(across * plan.tile_columns, plan.right_columns - plan.tile_columns)
        item = _Item(self.first[group], self.count[group], group, row, column)
        shape = plan.tile_rows, plan.tile_columns
        sums = pipelined(
            lax.div(item.count + (_UNITS - 1), jnp.int32(_UNITS)),
            plan.slots,
            2 * _UNITS,
            partial(self._load, item),
            partial(self._multiply, item),
            sums_of(shape, self.left.dtype),
        )
        place = group, pl.ds(row, shape[0]), pl.ds(column, shape[1])
        store(sums.astype(self.out.dtype), self.out.at[place])

    def _load(self, item: _Item, step: Array, slot: Array) -> None:
        """Starts the copies of one step: 64 rows of both operands. Those past the group's end are not multiplied."""
        plan = self.plan
        for n in range(_UNITS):
            unit = jnp.minimum(item.first + step * _UNITS + n, plan.rows // TILE_ROWS - 1)
            rows, part = pl.ds(unit * TILE_ROWS, TILE_ROWS), pl.ds(n * TILE_ROWS, TILE_ROWS)
            copy(self.left.at[rows, pl.ds(item.row, plan.tile_rows)], self.left_memory.at[slot, part])
            copy(self.right.at[rows, pl.ds(item.column, plan.tile_columns)], self.right_memory.at[slot, part])

    def _multiply(self, item: _Item, step: Array, slot: Array, sums: Array) -> Array:
        """Adds the products of the units of rows that belong to the group; every step has at least one."""

        def add(n: Array | int, sums: Array) -> Array:
            part = pl.ds(n * TILE_ROWS, TILE_ROWS)
            left = self.left_memory.at[slot, part].transpose((1, 0))
            return multiply(sums, left, self.right_memory.at[slot, part])

        if not self.plan.unrolled:
            return lax.fori_loop(0, jnp.minimum(item.count - step * _UNITS, _UNITS), add, sums)
        sums = add(0, sums)
        for n in range(1, _UNITS):
            sums = lax.cond(step * _UNITS + n < item.count, partial(add, n), lambda acc: acc, sums)
        return sums


def run(
    plan: OuterPlan,
    operands: tuple[Array, Array],
    place: tuple[Int[Array, " E"], Int[Array, " E"]],
    out: jax.ShapeDtypeStruct,
    interpret: Any,
) -> Float[Array, "E a c"]:
    """Launches the kernel; `ampere.grouped_outer` has checked the operands. `place`: first row and number of rows."""

    def program(*refs: Any) -> None:
        _Program(plan, *refs).run()

    dtype = operands[0].dtype
    scratch = [
        shared_memory((plan.slots, _UNITS * TILE_ROWS, width), dtype, width // 2)
        for width in (plan.tile_rows, plan.tile_columns)
    ]
    return launch("grouped_outer", program, out, scratch, grid(), interpret)(*place, *operands)
