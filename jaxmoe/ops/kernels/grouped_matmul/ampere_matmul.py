"""The program of `ampere.grouped_matmul`.

An item of work is one tile of columns of one span of rows. Items are numbered span by span, so that the columns of a
span follow each other and its rows stay in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxmoe.ops.kernels.ampere import copy, launch, pipelined, shared_memory, store
from jaxmoe.ops.kernels.grouped_matmul.ampere_block import grid, item_of, multiply, sums_of, turns
from jaxmoe.ops.kernels.grouped_matmul.ampere_tiles import HEIGHTS, TILE_ROWS, Tiles
from jaxmoe.ops.schedule import Spans


@dataclass(frozen=True)
class Plan:
    """What is known about a call when it is compiled.

    Attributes:
        rows: of the operands.
        transposed: the weights are [groups, out, inner], else [groups, inner, out].
        swiglu: the result is silu(gate) * up of the product's two halves.
        columns: of the result; with `swiglu` half of the product's.
        depths: of each pair of operands, the width that is contracted. The second pair is a low-rank term, if any.
        tiles: how the work is cut.
    """

    rows: int
    transposed: bool
    swiglu: bool
    columns: int
    depths: tuple[int, ...]
    tiles: Tiles

    @property
    def pair_steps(self) -> list[int]:
        """Steps that each pair needs in one item."""
        return [depth // self.tiles.depth for depth in self.depths]

    @property
    def products(self) -> int:
        """Products that one item forms; with SwiGLU one of gate and one of up."""
        return 2 if self.swiglu else 1

    @property
    def tile_columns(self) -> int:
        """Columns of the result in one item."""
        return self.tiles.columns // self.products

    @property
    def column_tiles(self) -> int:
        """Items per span."""
        return pl.cdiv(self.columns, self.tile_columns)


class _Work(NamedTuple):
    """References to the list of spans, in units of 16 rows, and to the offset for the groups."""

    first: Any
    height: Any
    group: Any
    used: Any
    offset: Any


class _Item(NamedTuple):
    """The first row, the number of rows, the group and the first column of an item's result."""

    row: Array
    rows: Array
    group: Array
    column: Array


@dataclass(frozen=True)
class _Program:
    """One thread block. `rows` and `weights` are its shared memory."""

    plan: Plan
    work: _Work
    pairs: Sequence[tuple[Any, Any]]
    out: Any
    rows: Any
    weights: Any

    def run(self) -> None:
        """Computes all items of this thread block, each with the code of the next height."""

        @pl.loop(0, turns(self.work.used[0] * self.plan.column_tiles))
        def _turn(turn: Array) -> None:
            item = self._item(item_of(turn))
            heights = [height for height in HEIGHTS if height <= self.plan.tiles.rows]
            for lower, height in zip((0, *heights), heights, strict=False):
                pl.when((item.rows > lower) & (item.rows <= height))(partial(self._compute, item, height))

    def _item(self, number: Array) -> _Item:
        plan, work = self.plan, self.work
        span, tile = lax.div(number, jnp.int32(plan.column_tiles)), lax.rem(number, jnp.int32(plan.column_tiles))
        # The last tile begins where it fits, and computes some columns once more.
        column = jnp.minimum(tile * plan.tile_columns, plan.columns - plan.tile_columns)
        return _Item(work.first[span] * TILE_ROWS, work.height[span] * TILE_ROWS, work.group[span], column)

    def _compute(self, item: _Item, height: int) -> None:
        """An item of at most `height` rows: the sums over all pairs, then the epilogue."""
        plan = self.plan
        sums = tuple(sums_of((height, plan.tile_columns), self.out.dtype) for _ in range(plan.products))
        copies = height // TILE_ROWS + plan.products
        load, step = partial(self._load, item, height), partial(self._multiply, height)
        self._epilogue(pipelined(sum(plan.pair_steps), plan.tiles.slots, copies, load, step, sums), item)

    def _load(self, item: _Item, height: int, step: Array, slot: Array) -> None:
        """Starts the copies of one step, which belongs to one of the pairs."""
        start = 0
        for n, (pair, steps) in enumerate(zip(self.pairs, self.plan.pair_steps, strict=True)):
            group = item.group if n else item.group + self.work.offset[0]  # the low-rank term has no offset
            load = partial(self._load_pair, pair, item._replace(group=group), height, step - start, slot)
            load() if len(self.pairs) == 1 else pl.when((step >= start) & (step < start + steps))(load)
            start += steps

    def _load_pair(self, pair: tuple[Any, Any], item: _Item, height: int, step: Array, slot: Array) -> None:
        """Copies `depth` columns of the rows, and the weights that multiply them."""
        plan, (left, matrix) = self.plan, pair
        depth = pl.ds(step * plan.tiles.depth, plan.tiles.depth)
        for at in range(0, height, TILE_ROWS):
            # Rows past the end of the array are not stored; in their place the last ones are read.
            row = jnp.minimum(item.row + at, plan.rows - TILE_ROWS)
            copy(left.at[pl.ds(row, TILE_ROWS), depth], self.rows.at[slot, pl.ds(at, TILE_ROWS)])
        for half in range(plan.products):  # with SwiGLU the gate's columns, then those of up
            columns = pl.ds(half * plan.columns + item.column, plan.tile_columns)
            place = (columns, depth) if plan.transposed else (depth, columns)
            copy(matrix.at[(item.group, *place)], self.weights.at[slot, half])

    def _multiply(self, height: int, _: Array, slot: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds the products of one slot, half a slot's depth at a time, as wide as a tile of shared memory."""
        depth = self.plan.tiles.depth
        for start in range(0, depth, depth // 2):
            part = pl.ds(start, depth // 2)
            rows = self.rows.at[slot, pl.ds(0, height), part]
            sums = tuple(multiply(acc, rows, self._weights(slot, half, part)) for half, acc in enumerate(sums))
        return sums

    def _weights(self, slot: Array, half: int, part: Any) -> Any:
        """Some of the contraction of a slot's weights, [part, columns]."""
        if self.plan.transposed:
            return self.weights.at[slot, half, :, part].transpose((1, 0))
        return self.weights.at[slot, half, part]

    def _epilogue(self, sums: tuple[Array, ...], item: _Item) -> None:
        """Applies SwiGLU if asked for, rounds the sums, and writes units of 16 rows as far as the span reaches."""
        dtype = self.out.dtype
        if self.plan.swiglu:
            gate, up = (acc.astype(dtype).astype(jnp.float32) for acc in sums)
            sums = (gate / (1 + jnp.exp(-gate)) * up,)
        result = sums[0].astype(dtype)
        for at in range(0, result.shape[0], TILE_ROWS):

            def store_unit(at: int = at) -> None:
                place = pl.ds(item.row + at, TILE_ROWS), pl.ds(item.column, self.plan.tile_columns)
                store(result[at : at + TILE_ROWS], self.out.at[place])

            pl.when(item.rows > at)(store_unit)


def run(
    plan: Plan, pairs: Sequence[tuple[Array, Array]], spans: Spans, offset: Any, interpret: Any
) -> Float[Array, "P out"]:
    """Launches the kernel; `ampere.grouped_matmul` has checked the operands."""

    def program(*refs: Any) -> None:
        work, operands, (out, *memory) = _Work(*refs[:5]), refs[5:-3], refs[-3:]
        by_pair = list(zip(operands[::2], operands[1::2], strict=True))
        _Program(plan, work, by_pair, out, *memory).run()

    dtype, (rows, _, depth, slots) = pairs[0][0].dtype, plan.tiles
    columns = plan.tile_columns
    shape = (columns, depth) if plan.transposed else (depth, columns)
    tile = depth // 2 if plan.transposed else min(64, columns)
    scratch = [
        shared_memory((slots, rows, depth), dtype, depth // 2),
        shared_memory((slots, plan.products, *shape), dtype, tile),
    ]
    out = jax.ShapeDtypeStruct((plan.rows, plan.columns), dtype)
    as_array = partial(jnp.asarray, dtype=jnp.int32)
    work = [*spans[:3], as_array(spans.used).reshape(1), as_array(offset).reshape(1)]
    kernel = launch("grouped_matmul", program, out, scratch, grid(), interpret)
    return kernel(*work, *(array for pair in pairs for array in pair))
