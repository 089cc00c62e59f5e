"""Grouped matmul for Hopper in Pallas Mosaic GPU: rows laid out by expert, times the expert's own matrix.

Two kernels, both persistent (one thread block per multiprocessor walks over the output) and warp-specialised: one
warpgroup does nothing but start copies into a ring of shared-memory stages, two multiply (wgmma, float32 accumulators).

    grouped_matmul   out[rows of a block] = x[rows of the block] @ W[group of the block]     (W^T, or W as it lies)
    grouped_outer    out[e] = sum over the rows of e of left[row]^T right[row]               (weight gradients)

Layout contract, made by `jaxmoe.dispatch.make_schedule`: the rows of a group are contiguous and end on a multiple of
64, the height of one warpgroup's wgmma. A block is 128 rows of one group, one half for each multiplying warpgroup, or
64 at an odd group's end, where the second warpgroup rests: so a group wastes 32 rows on average, not 64. Rows that
belong to no block are neither read nor written: what the output holds there is whatever the memory held. A stack of all
layers' experts is passed whole, [layers * E, out, in]; the group index picks the matrix, and no slice of it is copied.

Everything here needs jax 0.11 or newer and compute capability 9.0; `jaxmoe.implementations` decides.
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

TILE_ROWS = 64  # the granule of the row layout
_DEPTH = 64  # of the contraction, a stage
_COPY_REGISTERS, _COMPUTE_REGISTERS = 40, 232  # per thread; together the 64 K registers of a multiprocessor
_SHARED_BYTES = 232_448 - 1024  # of a Hopper multiprocessor, less the barriers


class Blocks(NamedTuple):
    """Blocks of rows: `place` is 2 * (first row / 64) + (1 if it has 128 rows, 0 if 64), `group` its group; only the
    first `used` exist."""

    place: Int[Array, " blocks"]
    group: Int[Array, " blocks"]
    used: Int[Array, ""]


class Tiles(NamedTuple):
    """Output columns of a block, stages of the ring, and output pieces of 64 rows by 128 bytes that each multiplying
    warpgroup stages at a time."""

    columns: int
    stages: int
    pieces: int


def default_tiles(columns: int, itemsize: int = 2) -> Tiles:
    """The fastest tiles measured for an output of `columns` (docs/log.md): four stages of the ring matter more than an
    output that is staged whole."""
    width = next(w for w in (256, 128, 64) if columns % w == 0 or w == 64)
    pieces = min(itemsize, width * itemsize // 128)
    stages = (_SHARED_BYTES - 2 * pieces * 64 * 128) // ((128 + width) * _DEPTH * 2)
    return Tiles(width, min(stages, 6), pieces)


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
                plgpu.copy_smem_to_gmem(staging.at[slot], out.at[pl.ds(row + i, height), pl.ds(column + j, width)])

    if out.shape[-1] == width:
        pl.when(column == 0)(write)  # not the second of two warpgroups that share the columns
    else:
        write()


def _ring(step: Array, stages: int) -> Array:
    return lax.rem(step, jnp.asarray(stages, step.dtype))


def _launch(
    body: Any, out: jax.ShapeDtypeStruct, scratch: list[Any], tiles: Tiles, interpret: Any, copies: int = 2
) -> Any:
    """The kernel of `body`, one block of three warpgroups per multiprocessor; adds staging and the ring's barriers, for
    stages that take this many copies."""
    width = 128 // jnp.dtype(out.dtype).itemsize
    while out.shape[-1] % width:
        width //= 2
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[
            *scratch,
            _shared((2, tiles.pieces, 64, width), out.dtype, width * jnp.dtype(out.dtype).itemsize),
            plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),  # the copies of a stage have landed
            plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),  # both multiplying warpgroups have read it
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
        tiles: by default `default_tiles`.
        interpret: run in JAX's interpreter (a test without a GPU).

    Raises:
        ValueError: a dtype or a size that the kernel cannot do.
    """
    inner, out = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    P, count = x.shape[0], blocks.place.shape[0]
    if x.shape[1] != inner:
        raise ValueError(f"x: expected {inner} columns, found {x.shape[1]}")
    if swiglu and not transposed:
        raise ValueError("swiglu: expected a transposed weight")
    # A block has TN columns of the product and, with SwiGLU, half as many of the result.
    result = out // 2 if swiglu else out
    pairs = [(x, weight), *others]
    widths = [matrix.shape[2 if transposed else 1] for _, matrix in pairs]
    for rows, matrix in pairs:
        _check("grouped_matmul", rows, matrix, (*widths, result))
    tiles = tiles or default_tiles(out if not swiglu or result % 128 == 0 else 128)
    TN, stages = tiles.columns, tiles.stages
    TO = TN // 2 if swiglu else TN
    as_array = partial(jnp.asarray, dtype=jnp.int32)
    work_list = [blocks.place, blocks.group, as_array(blocks.used).reshape(1), as_array(offset).reshape(1)]
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

    def body(*refs: Any) -> None:
        place_ref, group_ref, used_ref, offset_ref, *pair_refs = refs[: len(operands)]
        out_ref, a_smem, b_smem, staging, full, empty = refs[len(operands) :]
        warpgroup = lax.axis_index("wg")
        grid, sm = lax.axis_size("sm"), lax.axis_index("sm")
        # The columns of a block follow each other, so that its rows are in the L2 for all but the first.
        work = used_ref[0] * columns

        def column_of(index: Array) -> Array:
            return lax.rem(index, jnp.int32(columns)) * TO

        def place_of(index: Array) -> Array:
            return place_ref[jnp.minimum(lax.div(index, jnp.int32(columns)), count - 1)]

        @pl.when(warpgroup == 2)
        def _copy() -> None:
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")

            @plgpu.nd_loop((work,), collective_axes="sm")
            def _tile(info: Any) -> None:
                (index,) = info.index
                i, j = lax.div(index, jnp.int32(columns)), column_of(index)
                row, group = lax.div(place_ref[i], jnp.int32(2)) * TILE_ROWS, group_ref[i]

                def load(start: Array, k: Array, rows: Any, matrix: Any, group: Array) -> None:
                    slot = _ring(start + k, stages)

                    @pl.when(start + k >= stages)
                    def _free() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    here = pl.ds(k * _DEPTH, _DEPTH)
                    plgpu.copy_gmem_to_smem(rows.at[pl.ds(row, 128), here], a_smem.at[slot], full.at[slot])
                    if swiglu:
                        for half in (0, 1):
                            block = matrix.at[group, pl.ds(half * result + j, TO), here]
                            plgpu.copy_gmem_to_smem(block, b_smem.at[slot, pl.ds(half * TO, TO)], full.at[slot])
                    else:
                        block = (pl.ds(j, TN), here) if transposed else (here, pl.ds(j, TN))
                        plgpu.copy_gmem_to_smem(matrix.at[(group, *block)], b_smem.at[slot], full.at[slot])

                start = info.local_index * all_steps
                for n, length in enumerate(steps):
                    rows, matrix = pair_refs[2 * n : 2 * n + 2]
                    own = group + offset_ref[0] if n <= len(others) else group  # the low-rank term has no offset
                    pl.loop(0, length)(partial(load, start, rows=rows, matrix=matrix, group=own))
                    start += length

            # Every stage that was filled has been read before the block ends: no barrier is left half-way.
            total = lax.div(work - sm + grid - 1, jnp.int32(grid)) * all_steps

            @pl.loop(jnp.maximum(total - stages, 0), jnp.maximum(total, 0))
            def _wait(step: Array) -> None:
                plgpu.barrier_wait(empty.at[_ring(step, stages)])

        @pl.when(warpgroup < 2)
        def _multiply() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            own_rows = pl.ds(warpgroup * 64, 64)

            # The next block's place is read while this one is computed.
            @plgpu.nd_loop((work,), collective_axes="sm", init_carry=place_of(sm))
            def _tile(info: Any, carry: Array) -> Array:
                (index,) = info.index
                following = place_of(index + grid)
                first = info.local_index * all_steps
                rests = (warpgroup == 1) & (lax.rem(carry, jnp.int32(2)) == 0)

                @pl.when(rests)
                def _rest() -> None:
                    @pl.loop(0, all_steps)
                    def _pass(k: Array) -> None:
                        slot = _ring(first + k, stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.barrier_arrive(empty.at[slot])

                @pl.when(jnp.logical_not(rests))
                def _work() -> None:
                    def accumulate(acc: Any) -> Array:
                        @pl.loop(0, all_steps)
                        def _stage(k: Array) -> None:
                            slot = _ring(first + k, stages)
                            plgpu.barrier_wait(full.at[slot])
                            b = b_smem.at[slot]
                            plgpu.wgmma(acc, a_smem.at[slot, own_rows], b.transpose((1, 0)) if transposed else b)
                            # One product stays in flight; the stage that the last but one read is free.
                            plgpu.wgmma_wait(1)

                            @pl.when(k > 0)
                            def _release() -> None:
                                plgpu.barrier_arrive(empty.at[_ring(first + k - 1, stages)])

                        return acc[...]

                    acc = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((64, TN), jnp.float32))
                    plgpu.barrier_arrive(empty.at[_ring(first + all_steps - 1, stages)])
                    if swiglu:
                        gate, up = (acc[:, i : i + TO].astype(x.dtype).astype(jnp.float32) for i in (0, TO))
                        acc = gate / (1 + jnp.exp(-gate)) * up
                    row = lax.div(carry, jnp.int32(2)) * TILE_ROWS + warpgroup * 64
                    _store(acc, out_ref, staging.at[warpgroup], row, column_of(index))

                return following

            plgpu.wait_smem_to_gmem(0)

    swizzle = _swizzle(*widths) if transposed else _swizzle(*widths, out)  # wgmma wants both operands alike
    b_shape = (stages, TN, _DEPTH) if transposed else (stages, _DEPTH, TN)
    ring = [_shared((stages, 128, _DEPTH), x.dtype, swizzle), _shared(b_shape, x.dtype, swizzle)]
    out_type = jax.ShapeDtypeStruct((P, result), x.dtype)
    return _launch(body, out_type, ring, tiles, interpret, copies=3 if swiglu else 2)(*operands)


def grouped_outer(
    left: Float[Array, "P A"],
    right: Float[Array, "P C"],
    first: Int[Array, " E"],
    count: Int[Array, " E"],
    *,
    dtype: Any = jnp.float32,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> Float[Array, "E A C"]:
    """For each group the sum over its rows of left[row]^T right[row], in float32: the gradient of a group's matrix.

    Padding rows inside a group must be zero in `left` or `right` and finite in the other.

    Args:
        left: rows by group, bfloat16 or float16, A a multiple of 64.
        right: rows by group, of the same dtype.
        first: each group's first row, in units of 64 rows.
        count: its number of rows, padding included, in units of 64; a group without rows gets zeros.
        dtype: of the result.
        tiles: columns of the result that a block forms at a time, and so on.
        interpret: run in JAX's interpreter (a test without a GPU).

    Raises:
        ValueError: a dtype or a size that the kernel cannot do.
    """
    A, C, E = left.shape[1], right.shape[1], first.shape[0]
    if A % 64:
        raise ValueError(f"grouped_outer: expected a multiple of 64 columns in left, found {A}")
    _check("grouped_outer", left, right, (A, C))
    # A narrow left (an adapter's rank) is one warpgroup high: the two then share the columns, 64 or more each.
    TA = 64 if A == 64 else 128
    if tiles is None:
        tiles = default_tiles(128 if TA == 64 and C % 128 else C, jnp.dtype(dtype).itemsize)
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
                start, steps = first_ref[group] * TILE_ROWS, count_ref[group]

                @pl.loop(0, steps)
                def _stage(k: Array) -> None:
                    slot = _ring(carry + k, stages)

                    @pl.when(carry + k >= stages)
                    def _free() -> None:
                        plgpu.barrier_wait(empty.at[slot])

                    rows = pl.ds(start + k * _DEPTH, _DEPTH)
                    plgpu.copy_gmem_to_smem(left_ref.at[rows, pl.ds(i, TA)], a_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(right_ref.at[rows, pl.ds(j, TC)], b_smem.at[slot], full.at[slot])

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
                steps = count_ref[group]

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
    ring = [_shared((stages, _DEPTH, width), left.dtype, swizzle) for width in (TA, TC)]
    return _launch(body, jax.ShapeDtypeStruct((E, A, C), dtype), ring, tiles, interpret)(first, count, left, right)
