"""Grouped matmul for Hopper in Pallas Mosaic GPU: rows laid out by expert, times the expert's own matrix.

Two kernels, both persistent (one thread block per multiprocessor walks over the output) and warp-specialised: one
warpgroup does nothing but start copies into a ring of shared-memory stages, two multiply (wgmma, float32 accumulators).

    grouped_matmul   out[rows of a block] = x[rows of the block] @ W[group of the block]     (W^T, or W as it lies)
    grouped_outer    out[e] = sum over the rows of e of left[row]^T right[row]               (weight gradients)

Layout contract, made by `jaxmoe.ops.experts.make_schedule`: the rows of a group are contiguous and end on a multiple of
16. A block is some of them, at most 128 or 256, any multiple of 16; a group is cut into blocks of nearly equal height.
That works because the product is formed upside down, out^T = W x^T: wgmma's first dimension must be 64, and that is
columns of the output; the rows are its second, which may be any multiple of 8. So a group wastes 8 rows on average,
where rows on wgmma's first dimension would waste 32. Rows that belong to no block are not written: what the output
holds there is whatever the memory held. A stack of all layers' experts is passed whole, [layers * E, out, in]; the
group index picks the matrix, and no slice of it is copied.

Everything here needs jax 0.11 or newer and compute capability 9.0; `jaxmoe.ops.implementations` decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.schedule import Schedule, Spans

TILE_ROWS = 16  # the granule of the row layout
_DEPTH = 64  # of the contraction, a stage
_COPY_REGISTERS, _COMPUTE_REGISTERS = 40, 232  # per thread; together the 64 K registers of a multiprocessor
_SHARED_BYTES = 232_448 - 1024  # of a Hopper multiprocessor, less the barriers


Blocks = Spans


class Tiles(NamedTuple):
    """How `grouped_matmul` cuts the work: columns of the product that are formed at a time, the heights of a block that
    it has a program for, and stages of the ring. A block between two heights is computed as the higher; none may be
    higher than the last, and if there is only one, every block is that high."""

    columns: int
    heights: tuple[int, ...]
    stages: int


class OuterTiles(NamedTuple):
    """How `grouped_outer` does: columns, stages, and output pieces of 64 rows by 128 bytes that each multiplying
    warpgroup stages at a time."""

    columns: int
    stages: int
    pieces: int


SMALL, LARGE = 128, 256  # rows of the highest blocks


def default_tiles(columns: int, rows: int = SMALL, swiglu: bool = False) -> Tiles:
    """The fastest tiles measured for a product of `columns` and blocks of at most `rows` (docs/log.md)."""
    # Each height takes time to compile. Most blocks are a little lower than the highest.
    heights = (96, 112, 128) if rows == SMALL else (192, 224, 240, 256)
    # 256 columns, but where the last of them would be half empty or more.
    width = 256 if swiglu or (rows == SMALL and (columns - 1) % 256 >= 128) else 128
    stages = (_SHARED_BYTES - 2 * 128 * 128) // ((rows + width) * _DEPTH * 2)
    return Tiles(width, heights, min(stages, 6))


def default_outer_tiles(columns: int, itemsize: int = 4) -> OuterTiles:
    """The fastest tiles measured for an output of `columns`: four stages of the ring matter more than an output that is
    staged whole."""
    width = next(w for w in (256, 128, 64) if columns % w == 0 or w == 64)
    pieces = min(itemsize, width * itemsize // 128)
    stages = (_SHARED_BYTES - 2 * pieces * 64 * 128) // ((128 + width) * _DEPTH * 2)
    return OuterTiles(width, min(stages, 6), pieces)


def _swizzle(*sizes: int) -> int:
    """Bytes of the widest shared-memory swizzle (32, 64 or 128) that divides rows of these many 2-byte elements."""
    return 2 * math.gcd(64, *sizes)


def _shared(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory in the tiled, swizzled form that TMA writes and wgmma reads."""
    tile = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tile, plgpu.SwizzleTransform(swizzle)))


def _multiprocessors() -> int:
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 2  # two blocks in the interpreter


def _store(acc: Array, out: Any, staging: Any, row: Array, column: Array) -> None:
    """Writes one warpgroup's result to out[row:, column:], as many pieces at a time as there are staging buffers."""
    pieces, height, width = staging.shape
    rows = min(height, out.shape[0])  # fewer for an adapter's rank
    result = acc.astype(out.dtype)
    # A piece past the end of `out` is not written. TMA would clip it, but where `out` is one piece wide its place is
    # lost on the way (Mosaic drops dimensions of size one) and it would overwrite the first.
    across = range(0, min(acc.shape[1], out.shape[-1]), width)
    corners = [(i, j) for i in range(0, acc.shape[0], height) for j in across]

    def write() -> None:
        for start in range(0, len(corners), pieces):
            together = list(enumerate(corners[start : start + pieces]))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for slot, (i, j) in together:
                staging[slot] = result[i : i + height, j : j + width]
            plgpu.commit_smem()
            for slot, (i, j) in together:
                place = pl.ds(row + i, rows), pl.ds(column + j, width)
                plgpu.copy_smem_to_gmem(staging.at[slot, pl.ds(0, rows)], out.at[place])

    if out.shape[-1] == width:
        pl.when(column == 0)(write)  # not the second of two warpgroups that share the columns
    else:
        write()


def _stages_of(count: Array) -> Array:
    """How many stages the rows of a group take, which are given in units of 16."""
    return lax.div(count + (_DEPTH // TILE_ROWS - 1), jnp.asarray(_DEPTH // TILE_ROWS, count.dtype))


def _ring(step: Array, stages: int) -> Array:
    return lax.rem(step, jnp.asarray(stages, step.dtype))


def _launch(
    body: Any, out: jax.ShapeDtypeStruct, scratch: list[Any], stages: int, interpret: Any, copies: int = 2
) -> Any:
    """The kernel of `body`, one block of three warpgroups per multiprocessor; adds the ring's barriers, for stages that
    take this many copies."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[
            *scratch,
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),  # the copies of a stage have landed
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # both multiplying warpgroups have read it
        ],
        grid=(_multiprocessors(),),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )


def _check(name: str, left: Array, right: Array, sizes: tuple[int, ...]) -> None:
    if left.dtype != right.dtype or left.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name}: expected bfloat16 or float16 on both sides, found {left.dtype} and {right.dtype}")
    if any(size % 16 for size in sizes):
        raise ValueError(f"{name}: expected sizes that are multiples of 16, found {', '.join(map(str, sizes))}")


def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Float[Array, "groups a b"],
    blocks: Blocks,
    offset: Any = 0,
    *,
    transposed: bool,
    swiglu: bool = False,
    others: Sequence[tuple[Array, Array]] = (),
    low: Float[Array, "P rank"] | None = None,
    low_weight: Float[Array, "low_groups c d"] | None = None,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> Float[Array, "P out"]:
    """Each block of rows times its group's matrix, summed in float32, rounded once.

    Args:
        x: rows by group, bfloat16 or float16.
        weight: [groups, out, inner], contracted over `inner` if `transposed` (x W^T); else [groups, inner, out] (x W).
        transposed: which of the two.
        swiglu: the first half of the outputs is the gate of the second, [groups, 2F, inner]: gives silu(gate) * up,
            [P, F], of the rounded products. Only if `transposed`.
        blocks: which rows belong to which group.
        offset: added to the group for `weight`.
        others: more pairs such as (x, weight), of any inner width; their products are added in the same accumulators.
        low: the left factor of a low-rank term that is added there as well; its rank a multiple of 64.
        low_weight: its right factor by group, laid out as `weight` is, with `rank` for `inner`; not by `offset`.
        tiles: by default `default_tiles` for blocks of at most 128 rows; with `swiglu` there are no higher ones.
        interpret: run in JAX's interpreter (a test without a GPU).

    Raises:
        ValueError: a dtype or a size that the kernel cannot do.
    """
    inner, out = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    P, count = x.shape[0], blocks.first.shape[0]
    if x.shape[1] != inner:
        raise ValueError(f"x: expected {inner} columns, found {x.shape[1]}")
    if swiglu and not transposed:
        raise ValueError("swiglu: expected a transposed weight")
    # A block has TN columns of the product and, with SwiGLU, half as many of the result.
    result = out // 2 if swiglu else out
    pairs = [(x, weight), *others]
    widths = [matrix.shape[2 if transposed else 1] for _, matrix in pairs]
    for left, matrix in pairs:
        _check("grouped_matmul", left, matrix, (*widths, result))
    tiles = tiles or default_tiles(out, swiglu=swiglu)
    TN, heights, stages = tiles
    products = TN // 128  # of 64 columns that a warpgroup forms: two, gate and up, for SwiGLU
    if swiglu and products != 2:
        raise ValueError(f"swiglu: expected tiles of 256 columns, found {TN}")
    TO = TN // 2 if swiglu else TN
    as_array = partial(jnp.asarray, dtype=jnp.int32)
    work_list = [*blocks[:3], as_array(blocks.used).reshape(1), as_array(offset).reshape(1)]
    steps = [pl.cdiv(width, _DEPTH) for width in widths]
    if low is not None:
        assert low_weight is not None
        if low.shape[1] % _DEPTH:
            raise ValueError(f"low: expected a multiple of {_DEPTH} columns, found {low.shape[1]}")
        steps.append(low.shape[1] // _DEPTH)
        pairs.append((low, low_weight))
    operands = [*work_list, *(array for pair in pairs for array in pair)]
    columns = pl.cdiv(result, TO)
    all_steps = sum(steps)
    highest = heights[-1]
    stored = pl.cdiv(result, 64) * 64  # whole pieces are; what is too much is cut off

    def body(*refs: Any) -> None:
        first_ref, height_ref, group_ref, used_ref, offset_ref, *pair_refs = refs[: len(operands)]
        out_ref, w_smem, x_smem, staging, full, empty = refs[len(operands) :]
        warpgroup = lax.axis_index("wg")
        grid, sm = lax.axis_size("sm"), lax.axis_index("sm")
        # The columns of a block follow each other, so that its rows are in the L2 for all but the first.
        work = used_ref[0] * columns
        share = lax.div(work - sm + grid - 1, jnp.int32(grid))  # of this multiprocessor: sm, sm + grid, ...

        def column_of(index: Array) -> Array:
            return lax.rem(index, jnp.int32(columns)) * TO

        def rows_of(index: Array) -> tuple[Array, Array]:
            block = jnp.minimum(lax.div(index, jnp.int32(columns)), count - 1)
            return first_ref[block], height_ref[block]

        @pl.when(warpgroup == 2)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @pl.loop(0, share)
            def _tile(turn: Array) -> None:
                index = sm + turn * grid
                i, j = lax.div(index, jnp.int32(columns)), column_of(index)
                row, group = first_ref[i] * TILE_ROWS, group_ref[i]

                def load(start: Array, k: Array, left: Any, matrix: Any, group: Array) -> None:
                    slot = _ring(start + k, stages)

                    @pl.when(start + k >= stages)
                    def _free() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    here = pl.ds(k * _DEPTH, _DEPTH)
                    # A lower block's copy takes rows of the next along, which nobody multiplies.
                    plgpu.copy_gmem_to_smem(left.at[pl.ds(row, highest), here], x_smem.at[slot], full.at[slot])
                    if swiglu:
                        for half in (0, 1):
                            block = matrix.at[group, pl.ds(half * result + j, TO), here]
                            plgpu.copy_gmem_to_smem(block, w_smem.at[slot, pl.ds(half * TO, TO)], full.at[slot])
                    else:
                        block = (pl.ds(j, TN), here) if transposed else (here, pl.ds(j, TN))
                        plgpu.copy_gmem_to_smem(matrix.at[(group, *block)], w_smem.at[slot], full.at[slot])

                start = turn * all_steps
                for n, length in enumerate(steps):
                    left, matrix = pair_refs[2 * n : 2 * n + 2]
                    own = group + offset_ref[0] if n <= len(others) else group  # the low-rank term has no offset
                    pl.loop(0, length)(partial(load, start, left=left, matrix=matrix, group=own))
                    start += length

            # Every stage that was filled has been read before the block ends: no barrier is left half-way.
            total = share * all_steps

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _wait(step: Array) -> None:
                plgpu.barrier_wait(empty.at[_ring(step, stages)])

        def multiply(start: Array, height: int) -> tuple[Array, ...]:
            """Forms the columns of this warpgroup, transposed: for each 64 of them [64, height]."""

            def accumulate(*sums: Any) -> tuple[Array, ...]:
                @pl.loop(0, all_steps)
                def _stage(k: Array) -> None:
                    slot = _ring(start + k, stages)
                    plgpu.barrier_wait(full.at[slot])
                    across = x_smem.at[slot, pl.ds(0, height)].transpose((1, 0))
                    for n, acc in enumerate(sums):
                        # SwiGLU's gate and up lie one behind the other; a warpgroup has 64 of each.
                        at = warpgroup * 64 + n * TO if swiglu else (warpgroup * products + n) * 64
                        own = pl.ds(at, 64)
                        w = w_smem.at[slot, own] if transposed else w_smem.at[slot, :, own].transpose((1, 0))
                        plgpu.wgmma(acc, w, across)
                    # This stage's products stay in flight; the stage before is free.
                    plgpu.wgmma_wait(products)

                    @pl.when(k > 0)
                    def _release() -> None:
                        plgpu.barrier_arrive(empty.at[_ring(start + k - 1, stages)])

                return tuple(acc[...] for acc in sums)

            accumulators = [plgpu.WGMMAAccumulatorRef((64, height), jnp.float32) for _ in range(products)]
            found = pl.run_scoped(accumulate, *accumulators)
            plgpu.barrier_arrive(empty.at[_ring(start + all_steps - 1, stages)])
            if not swiglu:
                return found
            gate, up = (acc.astype(x.dtype).astype(jnp.float32) for acc in found)
            return (gate / (1 + jnp.exp(-gate)) * up,)

        def store(sums: Array, row: Array, column: Array, rows: Array, least: int) -> None:
            """Writes 64 columns of a block of so many `rows`: the `least` that it has at once, any others by 16."""
            mine = staging.at[warpgroup]
            for start in range(0, sums.shape[1], 128):
                size = min(128, sums.shape[1] - start)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                mine.at[pl.ds(0, size)].transpose((1, 0))[...] = sums[:, start : start + size].astype(x.dtype)
                plgpu.commit_smem()

                def copy(at: int, size: int, start: int = start) -> None:
                    place = pl.ds(row + start + at, size), pl.ds(column, 64)
                    plgpu.copy_smem_to_gmem(mine.at[pl.ds(at, size)], out_ref.at[place])

                certain = min(max(least - start, 0), size)
                if certain:
                    copy(0, certain)
                for at in range(certain, size, TILE_ROWS):
                    pl.when(rows > start + at)(partial(copy, at, TILE_ROWS))

        @pl.when(warpgroup < 2)
        def _multiply() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

            # The next block's place is read while this one is computed.
            def tile(turn: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                index = sm + turn * grid
                following = rows_of(index + grid)
                row, rows = (units * TILE_ROWS for units in carry)
                column = column_of(index) + warpgroup * (TO // 2)
                for lower, height in zip((0, *heights), heights, strict=False):
                    least = lower + TILE_ROWS if len(heights) > 1 else height

                    @pl.when((rows > lower) & (rows <= height))
                    def _work(height: int = height, least: int = least) -> None:
                        for n, sums in enumerate(multiply(turn * all_steps, height)):
                            write = partial(store, sums, row, column + 64 * n, rows, least)
                            # TMA clips what is past the end of `out`. But where that is one piece wide, its place is
                            # lost on the way (Mosaic drops dimensions of size one) and it would overwrite the first.
                            write() if stored > 64 else pl.when(column + 64 * n == 0)(write)

                return following

            lax.fori_loop(0, share, tile, rows_of(sm))
            plgpu.wait_smem_to_gmem(0)

    swizzle = _swizzle(*widths) if transposed else _swizzle(*widths, out)  # wgmma wants both operands alike
    w_shape = (stages, TN, _DEPTH) if transposed else (stages, _DEPTH, TN)
    scratch = [
        _shared(w_shape, x.dtype, swizzle),
        _shared((stages, highest, _DEPTH), x.dtype, swizzle),
        _shared((2, min(highest, 128), 64), x.dtype),
    ]
    out_type = jax.ShapeDtypeStruct((P, stored), x.dtype)
    return _launch(body, out_type, scratch, stages, interpret, copies=3 if swiglu else 2)(*operands)[:, :result]


def grouped_outer(
    left: Float[Array, "P A"],
    right: Float[Array, "P C"],
    first: Int[Array, " E"],
    count: Int[Array, " E"],
    *,
    columns: tuple[int, int] | None = None,
    dtype: Any = jnp.float32,
    tiles: OuterTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "E a c"]:
    """For each group the sum over its rows of left[row]^T right[row], in float32: the gradient of a group's matrix.

    Padding rows inside a group must be zero in `left` or `right` and finite in the other.

    Args:
        left: rows by group, bfloat16 or float16, A a multiple of 64.
        right: rows by group, of the same dtype.
        first: each group's first row, in units of 16 rows.
        count: its number of rows, padding included, in units of 16; a group without rows gets zeros.
        columns: (a, c), how many columns of left and of right the result is of, by default all; multiples of 16. For an
            adapter's rank, which the tensor cores take padded to 64.
        dtype: of the result.
        tiles: columns of the result that a block forms at a time, and so on.
        interpret: run in JAX's interpreter (a test without a GPU).

    Raises:
        ValueError: a dtype or a size that the kernel cannot do.
    """
    P, A, C, E = *left.shape, right.shape[1], first.shape[0]
    if A % 64:
        raise ValueError(f"grouped_outer: expected a multiple of 64 columns in left, found {A}")
    out_rows, out_columns = columns or (A, C)
    _check("grouped_outer", left, right, (A, C, out_rows, out_columns))
    # A narrow left (an adapter's rank) is one warpgroup high: the two then share the columns, 64 or more each.
    TA = 64 if A == 64 else 128
    if tiles is None:
        tiles = default_outer_tiles(128 if TA == 64 and C % 128 else C, jnp.dtype(dtype).itemsize)
    TC, stages = tiles.columns, tiles.stages
    wg_rows, wg_columns = (64, TC) if TA == 128 else (64, TC // 2)
    across = pl.cdiv(C, TC)

    def body(first_ref: Any, count_ref: Any, left_ref: Any, right_ref: Any, out_ref: Any, *scratch: Any) -> None:
        a_smem, b_smem, staging, full, empty = scratch
        warpgroup = lax.axis_index("wg")
        grid = (E, pl.cdiv(A, TA) * across)
        corner = lambda rest: (lax.div(rest, jnp.int32(across)) * TA, lax.rem(rest, jnp.int32(across)) * TC)

        @pl.when(warpgroup == 2)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            def tile(info: Any, carry: Array) -> Array:
                group, rest = info.index
                i, j = corner(rest)
                start, count = first_ref[group], count_ref[group]
                steps = _stages_of(count)

                @pl.loop(0, steps)
                def _stage(k: Array) -> None:
                    slot = _ring(carry + k, stages)

                    @pl.when(carry + k >= stages)
                    def _free() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    for n in range(_DEPTH // TILE_ROWS):
                        unit = k * (_DEPTH // TILE_ROWS) + n
                        # Behind the group's end come zeros: TMA's answer to a row that does not exist.
                        rows = pl.ds(jnp.where(unit < count, (start + unit) * TILE_ROWS, P), TILE_ROWS)
                        part = slot, pl.ds(n * TILE_ROWS, TILE_ROWS)
                        plgpu.copy_gmem_to_smem(left_ref.at[rows, pl.ds(i, TA)], a_smem.at[part], full.at[slot])
                        plgpu.copy_gmem_to_smem(right_ref.at[rows, pl.ds(j, TC)], b_smem.at[part], full.at[slot])

                return carry + steps

            total: Any = plgpu.nd_loop(grid, collective_axes="sm", init_carry=jnp.int32(0))(tile)

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _wait(step: Array) -> None:
                plgpu.barrier_wait(empty.at[_ring(step, stages)])

        @pl.when(warpgroup < 2)
        def _multiply() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            row, column = (warpgroup * 64, 0) if TA == 128 else (0, warpgroup * wg_columns)

            @plgpu.nd_loop(grid, collective_axes="sm", init_carry=jnp.int32(0))
            def _tile(info: Any, carry: Array) -> Array:
                group, rest = info.index
                i, j = corner(rest)
                steps = _stages_of(count_ref[group])

                def accumulate(acc: Any) -> Array:
                    @pl.loop(0, steps)
                    def _stage(k: Array) -> None:
                        slot = _ring(carry + k, stages)
                        plgpu.barrier_wait(full.at[slot])
                        a = a_smem.at[slot].at[:, pl.ds(row, wg_rows)].transpose((1, 0))
                        plgpu.wgmma(acc, a, b_smem.at[slot].at[:, pl.ds(column, wg_columns)])
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _release() -> None:
                            plgpu.barrier_arrive(empty.at[_ring(carry + k - 1, stages)])

                    return acc[...]

                acc = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((wg_rows, wg_columns), jnp.float32))

                @pl.when(steps > 0)
                def _release_last() -> None:
                    plgpu.barrier_arrive(empty.at[_ring(carry + steps - 1, stages)])

                _store(acc, out_ref.at[group], staging.at[warpgroup], i + row, j + column)
                return carry + steps

            plgpu.wait_smem_to_gmem(0)

    swizzle = _swizzle(A, C)
    piece = math.gcd(out_columns, 128 // jnp.dtype(dtype).itemsize)
    scratch = [_shared((stages, _DEPTH, width), left.dtype, swizzle) for width in (TA, TC)]
    scratch.append(_shared((2, tiles.pieces, 64, piece), dtype, piece * jnp.dtype(dtype).itemsize))
    out_type = jax.ShapeDtypeStruct((E, out_rows, out_columns), dtype)
    copies = 2 * _DEPTH // TILE_ROWS
    return _launch(body, out_type, scratch, stages, interpret, copies)(first, count, left, right)


class Hopper:
    """The implementation "mosaic" of the grouped products."""

    rank_multiple = 64  # of the low-rank term; two 16-bit terms of a rank up to 32 then cost no padding
    min_linear_rows = 512  # below, a product reads the weight only once anyway and XLA's is as good

    def unsupported(self, dtype: Any, *widths: int) -> str | None:
        """Why it cannot run on rows of this dtype and these widths, or None."""
        if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11):
            return f"needs jax 0.11 or newer, found {jax.__version__}"
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            return f"needs bfloat16 or float16, found {jnp.dtype(dtype).name}"
        if odd := [width for width in widths if width % 16]:  # Pallas' narrowest swizzle is one of 16 values
            return f"needs widths that are multiples of 16, found {', '.join(map(str, odd))}"
        return None

    def tile_rows(self, routed_rows: int, num_experts: int) -> int:
        """16, whatever the load: the kernel takes several tiles at once."""
        return TILE_ROWS

    def span_rows(self, routed_rows: int, num_experts: int) -> tuple[int, ...]:
        """One height, or two where some products of a layer want higher spans."""
        return (SMALL, LARGE) if routed_rows >= _LARGE_ROWS * num_experts else (SMALL,)

    def matmul(
        self,
        x: Array,
        weight: Array | NF4Stack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool = False,
        low: LowRankTerm | None = None,
    ) -> Array:
        """As `GroupedMatmul.matmul`; with `swiglu` the kernel never writes the product of gate and up."""
        if isinstance(weight, NF4Stack):  # one layer's experts are decoded at a time, for this product alone
            weight, offset = weight[offset + jnp.arange(schedule.first_tile.shape[0])], 0
        large = weight.shape[1] * weight.shape[2] >= _LARGE_MATRIX and not swiglu
        rows = LARGE if large and LARGE in schedule.spans else SMALL
        tiles = default_tiles(weight.shape[1 if transposed else 2], rows, swiglu)
        options = {"low": low.rows, "low_weight": low.weight} if low is not None else {}
        return grouped_matmul(
            x, weight, schedule.spans[rows], offset, transposed=transposed, swiglu=swiglu, tiles=tiles, **options
        )

    def outer(self, left: Array, right: Array, schedule: Schedule) -> Array:
        """As `GroupedMatmul.outer`; the operands are padded to what the kernel takes."""
        a, c = left.shape[1], right.shape[1]
        columns = a + -a % TILE_ROWS, c + -c % TILE_ROWS
        left = jnp.pad(left, ((0, 0), (0, -a % 64)))
        right = jnp.pad(right, ((0, 0), (0, max(columns[1], 64) - c)))
        return grouped_outer(left, right, schedule.first_tile, schedule.tile_count, columns=columns)[:, :a, :c]

    def linear(
        self,
        x: Array,
        stack: Array,
        layer: Array,
        *,
        transposed: bool,
        others: Sequence[tuple[Array, Array]] = (),
        low: LowRankTerm | None = None,
    ) -> Array:
        """As `GroupedMatmul.linear`: one group of rows, so that the layer is read in the stack where it lies."""
        count = -(-x.shape[0] // SMALL)
        units = SMALL // TILE_ROWS
        index = jnp.arange(count, dtype=jnp.int32)
        spans = Spans(units * index, jnp.full_like(index, units), jnp.zeros_like(index), jnp.int32(count))
        # Every span has all its rows (those past the end are not written): one program to compile.
        tiles = default_tiles(stack.shape[1 if transposed else 2])._replace(heights=(SMALL,))
        options = {"low": low.rows, "low_weight": low.weight} if low is not None else {}
        return grouped_matmul(x, stack, spans, layer, transposed=transposed, others=others, tiles=tiles, **options)


# From so many rows an expert and elements of its matrix on, higher spans of fewer columns are faster.
_LARGE_ROWS, _LARGE_MATRIX = 1024, 2**21

HOPPER = Hopper()
