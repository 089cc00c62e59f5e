"""Grouped matmul for Hopper with both operands in FP8: rows quantised by token and 128 channels, weights by blocks.

    out[row] = sum over steps k of  x_scale[k, row] * w_scale[column's block, k] * (x codes . W codes)[k]

wgmma sums the e4m3 products of 128 channels in its own accumulators, which keep about 14 bits of a sum. Each step's sum
is therefore multiplied by its scales in float32 and added to float32 registers ("promoted"), as in DeepSeek-V3 (2024),
section 3.3.2. While one multiplying warpgroup promotes, the other one's products run.

`hopper_matmul` explains items, spans and the ring; only what differs is here. wgmma reads 8-bit operands with the
contraction as the inner dimension, so the weights are [groups, out, inner] and the product is x W^T. Products x W, and
those that a low-rank term joins, are `hopper_e4m3`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxmoe.fp8.codec import E4M3
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.ops.fp8_products import QuantizedRows
from jaxmoe.ops.kernels.grouped_matmul.hopper_e4m3 import Registers
from jaxmoe.ops.kernels.grouped_matmul.hopper_matmul import Items
from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import CONSUMERS, Ring, launch, run_warpgroups, shared_memory
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import SMALL, TILE_ROWS, Tiles
from jaxmoe.ops.schedule import Schedule, Spans
from jaxmoe.parameters import FP8_BLOCK

DEPTH = FP8_BLOCK  # of a step: one scale for each row and block of columns


# The fastest tiles measured (docs/log): a consumer holds two sums, and the step's beside them.
TILES = Tiles(256, (112, 128), 4)


@dataclass(frozen=True)
class _Plan(Items):
    """What is known about a call when it is compiled; `columns` of the result, with `swiglu` half of the product's."""

    swiglu: bool
    columns: int
    steps: int
    row_blocks: int  # blocks along the rows of one matrix: of gate, of up, or of the whole weight
    tiles: Tiles


class _Work(NamedTuple):
    """References to the list of spans, in units of 16 rows, and to the offset for the groups."""

    first: Any
    height: Any
    group: Any
    used: Any
    offset: Any


class _Operands(NamedTuple):
    """Rows and weights in memory: codes and scales of each; the weights' scales are flat."""

    rows: Any
    row_scales: Any
    weights: Any
    weight_scales: Any


class _Memory(NamedTuple):
    """The output, and the shared memory of a thread block."""

    out: Any
    weights: Any
    rows: Any
    row_scales: Any
    staging: Any


class _Target(NamedTuple):
    """Where a consumer writes: the span's first row, its number of rows (`least` or more), the first column."""

    row: Array
    rows: Array
    least: int
    column: Array


@dataclass(frozen=True)
class _Program:
    """One thread block; its items are first, first + stride, first + 2 stride, ..., `turns` of them."""

    plan: _Plan
    work: _Work
    operands: _Operands
    memory: _Memory
    ring: Ring
    turns: Array
    first: Array
    stride: Any
    warpgroup: Array

    def produce(self) -> None:
        """The producer: for each item, copies rows, their scales and weights into the ring, step by step."""
        plan, work = self.plan, self.work

        @pl.loop(0, self.turns)
        def _item(turn: Array) -> None:
            item = self.first + turn * self.stride
            span, column = lax.div(item, jnp.int32(plan.column_tiles)), self._column(item)
            row, group = work.first[span] * TILE_ROWS, work.group[span] + work.offset[0]
            pl.loop(0, plan.steps)(partial(self._load, row, group, column, turn * plan.steps))

        self.ring.drain(self.turns * plan.steps)

    def _load(self, row: Array, group: Array, column: Array, start: Array, k: Array) -> None:
        """Copies step k of an item."""
        plan, operands, memory = self.plan, self.operands, self.memory
        slot = self.ring.wait_until_free(start + k)
        filled = self.ring.filled.at[slot]
        depth, rows = pl.ds(k * DEPTH, DEPTH), pl.ds(row, plan.highest)
        plgpu.copy_gmem_to_smem(operands.rows.at[rows, depth], memory.rows.at[slot], filled)
        plgpu.copy_gmem_to_smem(operands.row_scales.at[k, rows], memory.row_scales.at[slot], filled)
        width = plan.tile_columns
        for half in range(2 if plan.swiglu else 1):  # the gate's columns, then those of up
            part = operands.weights.at[group, pl.ds(half * plan.columns + column, width), depth]
            place = memory.weights.at[slot, pl.ds(half * width, width)] if plan.swiglu else memory.weights.at[slot]
            plgpu.copy_gmem_to_smem(part, place, filled)

    def consume(self) -> None:
        """A consumer: for each item, computes 64 columns per product and hands them to the epilogue."""
        plan, heights = self.plan, self.plan.tiles.heights

        @pl.loop(0, self.turns)
        def _item(turn: Array) -> None:
            item = self.first + turn * self.stride
            span = lax.div(item, jnp.int32(plan.column_tiles))
            row, rows = self.work.first[span] * TILE_ROWS, self.work.height[span] * TILE_ROWS
            group = self.work.group[span] + self.work.offset[0]
            column = self._column(item) + self.warpgroup * (plan.tile_columns // CONSUMERS)
            for lower, height in zip((0, *heights), heights, strict=False):
                least = lower + TILE_ROWS if len(heights) > 1 else height

                @pl.when((rows > lower) & (rows <= height))
                def _work(height: int = height, least: int = least) -> None:
                    sums = self._multiply(turn * plan.steps, height, group, column)
                    self._epilogue(sums, _Target(row, rows, least, column))

    def _multiply(self, start: Array, height: int, group: Array, column: Array) -> tuple[Array, ...]:
        """The sums of one item, transposed: [64, height] in float32 for each product."""
        plan, memory = self.plan, self.memory

        def product(n: int, slot: Array) -> Array:
            """The sum of one step, unscaled."""
            at = (
                self.warpgroup * 64 + n * plan.tile_columns
                if plan.swiglu
                else (self.warpgroup * plan.products + n) * 64
            )

            def run(accumulator: Any) -> Array:
                rows = memory.rows.at[slot, pl.ds(0, height)].transpose((1, 0))
                plgpu.wgmma(accumulator, memory.weights.at[slot, pl.ds(at, 64)], rows)
                return accumulator[...]

            return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((64, height), jnp.float32))

        def step(k: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
            sums, scales = state
            following = self._weight_scales(group, column, jnp.minimum(k + 1, plan.steps - 1))
            slot = self.ring.wait_until_filled(start + k)
            of_rows = memory.row_scales[slot, pl.ds(0, height)]
            found = []
            for n, (acc, of_block) in enumerate(zip(sums, scales, strict=True)):
                part = product(n, slot)
                factors = lax.broadcast_in_dim(of_rows * of_block, (64, height), (1,))
                found.append(acc + part * factors)
            plgpu.commit_smem()  # the scales were read by plain loads, which TMA's next copy must not overtake
            self.ring.arrive(start + k)
            return tuple(found), following

        zeros = tuple(jnp.zeros((64, height), jnp.float32) for _ in range(plan.products))
        sums, _ = lax.fori_loop(0, plan.steps, step, (zeros, self._weight_scales(group, column, jnp.int32(0))))
        return sums

    def _weight_scales(self, group: Array, column: Array, k: Array) -> tuple[Array, ...]:
        """The scale of each product's block in step k. The blocks of gate and of up are counted separately."""
        plan = self.plan
        found = []
        for n in range(plan.products):
            at = column if plan.swiglu else column + 64 * n
            block = jnp.minimum(lax.div(at, jnp.int32(FP8_BLOCK)), plan.row_blocks - 1)
            if plan.swiglu:
                block += n * plan.row_blocks
            blocks = plan.row_blocks * (2 if plan.swiglu else 1)
            found.append(self.operands.weight_scales[(group * blocks + block) * plan.steps + k])
        return tuple(found)

    def _epilogue(self, sums: tuple[Array, ...], target: _Target) -> None:
        """Applies SwiGLU if asked for, rounds the sums and writes them."""
        dtype = self.memory.out.dtype
        if self.plan.swiglu:
            gate, up = (acc.astype(dtype).astype(jnp.float32) for acc in sums)
            sums = (gate / (1 + jnp.exp(-gate)) * up,)
        for n, part in enumerate(sums):
            self._store(part, target._replace(column=target.column + 64 * n))

    def _store(self, sums: Array, target: _Target) -> None:
        """Writes 64 columns through shared memory; `least` rows at once, any others in units of 16."""
        staging, size = self.memory.staging.at[self.warpgroup], sums.shape[1]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging.at[pl.ds(0, size)].transpose((1, 0))[...] = sums.astype(self.memory.out.dtype)
        plgpu.commit_smem()

        def copy(at: int, size: int) -> None:
            place = pl.ds(target.row + at, size), pl.ds(target.column, 64)
            plgpu.copy_smem_to_gmem(staging.at[pl.ds(at, size)], self.memory.out.at[place])

        copy(0, min(target.least, size))
        for at in range(target.least, size, TILE_ROWS):
            pl.when(target.rows > at)(partial(copy, at, TILE_ROWS))

    def _column(self, item: Array) -> Array:
        """The first column of an item's result."""
        return lax.rem(item, jnp.int32(self.plan.column_tiles)) * self.plan.tile_columns


def grouped_matmul(
    x: QuantizedRows,
    stack: FP8Stack,
    spans: Spans,
    offset: Any = 0,
    *,
    swiglu: bool = False,
    tiles: Tiles = TILES,
    interpret: Any = None,
) -> Float[Array, "P out"]:
    """Each span of rows times its group's matrix, transposed; the sums are float32, rounded to the stack's dtype once.

    Args:
        x: rows sorted by group; P is a multiple of 16.
        stack: matrices [out, inner] in bfloat16 or float16, inner a multiple of 128, each matrix of a multiple of 128
            rows.
        spans: which rows belong to which group.
        offset: added to the group.
        swiglu: the weight is gate, then up; the result is silu(gate) * up of the rounded products.
        tiles: how the work is cut.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.
    """
    out, inner = stack.shape[1:]
    columns = out // 2 if swiglu else out
    blocks = columns // FP8_BLOCK
    plan = _Plan(swiglu, columns, inner // DEPTH, blocks, tiles)

    def program(refs: tuple[Any, ...], ring: Ring) -> None:
        work, operands, memory = _Work(*refs[:5]), _Operands(*refs[5:9]), _Memory(*refs[9:])
        warpgroup = lax.axis_index("wg")
        stride, first = lax.axis_size("sm"), lax.axis_index("sm")
        turns = lax.div(work.used[0] * plan.column_tiles - first + stride - 1, jnp.int32(stride))
        block = _Program(plan, work, operands, memory, ring, turns, first, stride, warpgroup)
        run_warpgroups(block.produce, block.consume, warpgroup)

    slots = tiles.slots
    scratch = [
        shared_memory((slots, tiles.columns, DEPTH), E4M3),
        shared_memory((slots, plan.highest, DEPTH), E4M3),
        plgpu.SMEM((slots, plan.highest), jnp.float32),
        shared_memory((CONSUMERS, plan.highest, 64), stack.dtype),
    ]
    result = jax.ShapeDtypeStruct((x.codes.shape[0], columns), stack.dtype)
    kernel = launch(
        "grouped_matmul_fp8", program, result, scratch, slots=slots, copies=4 if swiglu else 3, interpret=interpret
    )
    as_array = partial(jnp.asarray, dtype=jnp.int32)
    work = [*spans[:3], as_array(spans.used).reshape(1), as_array(offset).reshape(1)]
    scales = stack.scales.astype(jnp.float32).reshape(-1)
    return kernel(*work, x.codes, x.scales.T, stack.codes, scales)


class RowsInFP8(Registers):
    """The implementation "mosaic" of products with experts in FP8: as "registers", and of rows in FP8."""

    def quantized_matmul(
        self, rows: QuantizedRows, stack: FP8Stack, schedule: Schedule, offset: Any, *, swiglu: bool
    ) -> Float[Array, "P out"]:
        """As `QuantizedProducts.quantized_matmul`."""
        return grouped_matmul(rows, stack, schedule.spans[SMALL], offset, swiglu=swiglu)


ROWS_IN_FP8 = RowsInFP8()
