"""The program of `hopper.grouped_matmul`: producer, consumer and epilogue. `hopper.py` explains how they work together.

An item of work is one tile of columns of one span of rows. Items are numbered span by span, so that the columns of a
span follow each other and its rows stay in the L2 cache. Multiprocessor m of n runs the items m, m + n, m + 2n, ...
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
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import (
    CONSUMERS,
    Ring,
    launch,
    run_warpgroups,
    shared_memory,
    swizzle_bytes,
)
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import DEPTH, TILE_ROWS, Tiles
from jaxmoe.ops.schedule import Spans


class Items:
    """How tiles cut a product into items, for a plan with these fields."""

    swiglu: bool
    columns: int
    tiles: Tiles

    @property
    def products(self) -> int:
        """Products of 64 columns that each consumer forms in one item; with SwiGLU one of gate and one of up, or one of
        the two (`halved`)."""
        return self.tiles.columns // (64 * CONSUMERS)

    @property
    def halved(self) -> bool:
        """Whether one consumer forms the gate, the other one up; for SwiGLU each gives the other half of its rows."""
        return self.swiglu and self.products == 1

    @property
    def tile_columns(self) -> int:
        """Columns of the result in one item."""
        return self.tiles.columns // 2 if self.swiglu else self.tiles.columns

    @property
    def column_tiles(self) -> int:
        """Items per span."""
        return pl.cdiv(self.columns, self.tile_columns)

    @property
    def highest(self) -> int:
        """Rows of the highest span."""
        return self.tiles.heights[-1]


@dataclass(frozen=True)
class Plan(Items):
    """What is known about a call when it is compiled.

    Attributes:
        transposed: the weights are [groups, out, inner], else [groups, inner, out].
        swiglu: the result is silu(gate) * up of the product's two halves.
        columns: of the result; with `swiglu` half of the product's.
        depths: of each pair of operands, the width that is contracted.
        with_offset: this many pairs, from the first, add the offset to the group; the low-rank pair does not.
        tiles: how the work is cut.
    """

    transposed: bool
    swiglu: bool
    columns: int
    depths: tuple[int, ...]
    with_offset: int
    tiles: Tiles

    @property
    def pair_steps(self) -> list[int]:
        """Steps of the ring that each pair needs in one item."""
        return [pl.cdiv(depth, DEPTH) for depth in self.depths]

    @property
    def steps(self) -> int:
        """Steps of the ring in one item."""
        return sum(self.pair_steps)

    @property
    def stored_columns(self) -> int:
        """Columns of the array that the kernel writes: whole pieces of 64; the surplus is cut off afterwards."""
        return pl.cdiv(self.columns, 64) * 64


class Work(NamedTuple):
    """References to the list of spans, in units of 16 rows, and to the offset for the groups."""

    first: Any
    height: Any
    group: Any
    used: Any
    offset: Any


class Source(NamedTuple):
    """Where the producer reads one item's operands: the first row, the group and the first column of the result."""

    row: Array
    group: Array
    column: Array


class _Target(NamedTuple):
    """Where a consumer writes: the span's first row, its number of rows (`least` or more), the first column."""

    row: Array
    rows: Array
    least: int
    column: Array


class Share(NamedTuple):
    """The items of one multiprocessor: how many, the first, and the distance from one to the next."""

    turns: Array
    first: Array
    stride: Any

    @classmethod
    def of(cls, plan: Plan, work: Work) -> Share:
        """The share of the multiprocessor that runs this."""
        stride, first = lax.axis_size("sm"), lax.axis_index("sm")
        items = work.used[0] * plan.column_tiles
        return cls(lax.div(items - first + stride - 1, jnp.int32(stride)), first, stride)

    def item(self, turn: Array) -> Array:
        return self.first + turn * self.stride


@dataclass(frozen=True)
class Program:
    """One thread block. `rows`, `weights` and `staging` are its shared memory, `warpgroup` says which code runs. If the
    consumers swap halves, `swap` are two barriers: both have given, both have taken."""

    plan: Plan
    work: Work
    pairs: Sequence[tuple[Any, Any]]
    out: Any
    weights: Any
    rows: Any
    staging: Any
    ring: Ring
    share: Share
    warpgroup: Array
    swap: Sequence[Any]

    def produce(self) -> None:
        """The producer: for each item, copies every pair's rows and weights into the ring, step by step."""
        plan, work = self.plan, self.work

        @pl.loop(0, self.share.turns)
        def _item(turn: Array) -> None:
            item = self.share.item(turn)
            span, column = lax.div(item, jnp.int32(plan.column_tiles)), self._column(item)
            row, group = work.first[span] * TILE_ROWS, work.group[span]
            step = turn * plan.steps
            for n, (pair, steps) in enumerate(zip(self.pairs, plan.pair_steps, strict=True)):
                own = group + work.offset[0] if n < plan.with_offset else group
                pl.loop(0, steps)(partial(self.load, pair, Source(row, own, column), step))
                step += steps

        self.ring.drain(self.share.turns * plan.steps)

    def load(self, pair: tuple[Any, Any], source: Source, start: Array, k: Array) -> None:
        """Copies step k of a pair: DEPTH columns of the rows, and the weights that multiply them."""
        plan, (left, matrix) = self.plan, pair
        slot = self.ring.wait_until_free(start + k)
        filled = self.ring.filled.at[slot]
        depth = pl.ds(k * DEPTH, DEPTH)
        # The copy is as high as the highest span. With a lower span it also brings unused rows of the next.
        plgpu.copy_gmem_to_smem(left.at[pl.ds(source.row, plan.highest), depth], self.rows.at[slot], filled)
        width = plan.tile_columns
        if plan.swiglu:
            for half in (0, 1):  # the gate's columns, then those of up
                part = matrix.at[source.group, pl.ds(half * plan.columns + source.column, width), depth]
                plgpu.copy_gmem_to_smem(part, self.weights.at[slot, pl.ds(half * width, width)], filled)
        else:
            columns = pl.ds(source.column, width)
            part = (columns, depth) if plan.transposed else (depth, columns)
            plgpu.copy_gmem_to_smem(matrix.at[(source.group, *part)], self.weights.at[slot], filled)

    def consume(self) -> None:
        """A consumer: for each item, computes 64 columns per product and hands them to the epilogue."""
        plan, heights = self.plan, self.plan.tiles.heights

        # The next span's place is read from memory while this one is computed.
        def turn(number: Array, place: tuple[Array, Array]) -> tuple[Array, Array]:
            item = self.share.item(number)
            following = self._place(item + self.share.stride)
            row, rows = (units * TILE_ROWS for units in place)
            own = 0 if plan.halved else self.warpgroup * (plan.tile_columns // CONSUMERS)
            column = self._column(item) + own
            for lower, height in zip((0, *heights), heights, strict=False):
                least = lower + TILE_ROWS if len(heights) > 1 else height

                @pl.when((rows > lower) & (rows <= height))
                def _work(height: int = height, least: int = least) -> None:
                    sums = self.multiply(number * plan.steps, height)
                    epilogue = self._epilogue_of_halves if plan.halved else self._epilogue
                    epilogue(sums, _Target(row, rows, least, column))

            return following

        lax.fori_loop(0, self.share.turns, turn, self._place(self.share.first))

    def multiply(self, start: Array, height: int) -> tuple[Array, ...]:
        """The sums of one item over all pairs, transposed: [64, height] in float32 for each product."""
        plan = self.plan

        def accumulate(*sums: Any) -> tuple[Array, ...]:
            def multiply_slot(slot: Array) -> None:
                rows = self.rows.at[slot, pl.ds(0, height)].transpose((1, 0))
                for n, acc in enumerate(sums):
                    # With SwiGLU the slot holds all of the gate, then all of up; a consumer uses 64 columns of each.
                    at = self.warpgroup * 64 + n * plan.tile_columns if plan.swiglu else self.product(n)
                    columns = pl.ds(at, 64)
                    if plan.transposed:
                        weights = self.weights.at[slot, columns]
                    else:
                        weights = self.weights.at[slot, :, columns].transpose((1, 0))
                    plgpu.wgmma(acc, weights, rows)

            self.ring.multiply(start, plan.steps, multiply_slot, in_flight=plan.products)
            return tuple(acc[...] for acc in sums)

        accumulators = [plgpu.WGMMAAccumulatorRef((64, height), jnp.float32) for _ in range(plan.products)]
        sums = pl.run_scoped(accumulate, *accumulators)
        self.ring.arrive(start + plan.steps - 1)
        return sums

    def _epilogue(self, sums: tuple[Array, ...], target: _Target) -> None:
        """Applies SwiGLU if asked for, rounds the sums and writes them."""
        if self.plan.swiglu:
            sums = (self._swiglu(*sums),)
        for n, part in enumerate(sums):
            column = target.column + 64 * n
            write = partial(self._store, part, target._replace(column=column))
            # TMA drops what lies past the end of `out`. If `out` is only one piece wide, Mosaic removes that dimension
            # of size one and with it the piece's position: a second piece would overwrite the first.
            write() if self.plan.stored_columns > 64 else pl.when(column == 0)(write)

    def _swiglu(self, *products: Array) -> Array:
        """silu(gate) * up of the rounded products."""
        gate, up = (sums.astype(self.out.dtype).astype(jnp.float32) for sums in products)
        return gate / (1 + jnp.exp(-gate)) * up

    def _epilogue_of_halves(self, sums: tuple[Array, ...], target: _Target) -> None:
        """Swaps halves of gate and up with the other consumer, and writes SwiGLU of the rows that this one then has.

        What a consumer gives lies where it stages its result afterwards, once the other one has taken it.
        """
        given, taken = self.swap
        half = sums[0].shape[1] // CONSUMERS
        own, other = (self.staging.at[wg, pl.ds(0, half)] for wg in (self.warpgroup, 1 - self.warpgroup))
        halves = [sums[0][:, start : start + half] for start in (0, half)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for number in range(CONSUMERS):

            @pl.when(self.warpgroup == number)
            def _of_consumer(number: int = number) -> None:
                self.stage(halves[1 - number], own)
                plgpu.barrier_arrive(given)
                plgpu.barrier_wait(given)
                found = self.staged(other)
                plgpu.barrier_arrive(taken)
                plgpu.barrier_wait(taken)
                pair = (halves[number], found) if number == 0 else (found, halves[number])
                self.stage(self._swiglu(*pair), own)
                plgpu.commit_smem()
                self._copy_out(number * half, half, target)

    def _store(self, sums: Array, target: _Target) -> None:
        """Writes 64 columns through shared memory, 128 rows at a time."""
        staging = self.staging.at[self.warpgroup]
        for start in range(0, sums.shape[1], 128):
            size = min(128, sums.shape[1] - start)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.stage(sums[:, start : start + size], staging.at[pl.ds(0, size)])
            plgpu.commit_smem()
            self._copy_out(start, size, target)

    def _copy_out(self, start: int, size: int, target: _Target) -> None:
        """Starts the copies of `size` staged rows, which are those from `start` on in the span.

        `least` rows exist in every span that this code handles: they are written at once. Any others go out in units
        of 16 rows, as far as the span reaches.
        """
        staging = self.staging.at[self.warpgroup]

        def copy(at: int, size: int) -> None:
            place = pl.ds(target.row + start + at, size), pl.ds(target.column, 64)
            plgpu.copy_smem_to_gmem(staging.at[pl.ds(at, size)], self.out.at[place])

        certain = min(max(target.least - start, 0), size)
        if certain:
            copy(0, certain)
        for at in range(certain, size, TILE_ROWS):
            pl.when(target.rows > start + at)(partial(copy, at, TILE_ROWS))

    def staged(self, rows: Any) -> Array:
        """What `stage` has put there."""
        return rows.transpose((1, 0))[...]

    def stage(self, sums: Array, rows: Any) -> None:
        """Puts sums [64, size] into shared memory [size, 64], rounded."""
        rows.transpose((1, 0))[...] = sums.astype(self.out.dtype)

    def _column(self, item: Array) -> Array:
        """The first column of an item's result."""
        return lax.rem(item, jnp.int32(self.plan.column_tiles)) * self.plan.tile_columns

    def _place(self, item: Array) -> tuple[Array, Array]:
        """First row and number of rows of an item's span, in units of 16; past the last item, of any span."""
        last = self.work.first.shape[0] - 1
        span = jnp.minimum(lax.div(item, jnp.int32(self.plan.column_tiles)), last)
        return self.work.first[span], self.work.height[span]

    def product(self, n: int) -> Array:
        """The column in a slot at which this consumer's product `n` begins, without SwiGLU."""
        return (self.warpgroup * self.plan.products + n) * 64


def run(
    plan: Plan, pairs: Sequence[tuple[Array, Array]], spans: Spans, offset: Any, interpret: Any
) -> Float[Array, "P out"]:
    """Launches the kernel; `hopper.grouped_matmul` has checked the operands."""

    def program(refs: tuple[Any, ...], ring: Ring) -> None:
        barriers = refs[len(refs) - len(swapped) :]
        refs = refs[: len(refs) - len(swapped)]
        work, operands, memory = Work(*refs[:5]), refs[5:-4], refs[-4:]
        out, weights, rows, staging = memory
        warpgroup = lax.axis_index("wg")
        share = Share.of(plan, work)
        by_pair = list(zip(operands[::2], operands[1::2], strict=True))
        thread_block = Program(plan, work, by_pair, out, weights, rows, staging, ring, share, warpgroup, barriers)
        run_warpgroups(thread_block.produce, thread_block.consume, warpgroup)

    swapped = [plgpu.Barrier(num_arrivals=CONSUMERS) for _ in range(2)] if plan.halved else []
    x, weight = pairs[0]
    columns, _, slots = plan.tiles
    # wgmma needs both operands in the same swizzle.
    widths = plan.depths if plan.transposed else (*plan.depths, weight.shape[2])
    swizzle = swizzle_bytes(*widths)
    weights_shape = (slots, columns, DEPTH) if plan.transposed else (slots, DEPTH, columns)
    scratch = [
        shared_memory(weights_shape, x.dtype, swizzle),
        shared_memory((slots, plan.highest, DEPTH), x.dtype, swizzle),
        shared_memory((CONSUMERS, min(plan.highest, 128), 64), x.dtype),
        *swapped,
    ]
    out = jax.ShapeDtypeStruct((x.shape[0], plan.stored_columns), x.dtype)
    copies = 3 if plan.swiglu else 2  # SwiGLU's weights come in two pieces
    kernel = launch("grouped_matmul", program, out, scratch, slots=slots, copies=copies, interpret=interpret)
    as_array = partial(jnp.asarray, dtype=jnp.int32)
    work = [*spans[:3], as_array(spans.used).reshape(1), as_array(offset).reshape(1)]
    return kernel(*work, *(array for pair in pairs for array in pair))[:, : plan.columns]
