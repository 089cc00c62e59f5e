"""The Hopper kernel's products with experts in NF4, decoded in registers.

`hopper_decoding` has the kernel. The 16 values of NF4 lie in the lanes of a warp, twice; a shuffle looks a code up by
the five lowest bits, of which the fifth does not matter. The scales are decoded first, those of a layer.

x W^T: codes follow each other along the contracted axis. Eight of them are a word of four bytes, and a thread's two are
byte q of it, for the q-th thread of the four that share a row. It reads whole rows and shifts.

x W: codes follow each other along the result's columns. `ldmatrix` with transposition takes a pair of bytes, four
columns, as one element, and gives each thread those of two neighbours along the contracted axis. Two warps share them,
and one byte is the columns of rows m and m + 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxmoe.nf4.codec import NF4_TABLE
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.kernels.grouped_matmul.hopper_decoding import (
    RANK,
    Coded,
    Piece,
    grouped_matmul,
    has_decoded_bits,
    why_not,
)
from jaxmoe.ops.kernels.grouped_matmul.hopper_matmul import Plan, Source
from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import shared_memory
from jaxmoe.ops.kernels.grouped_matmul.hopper_thread import OPERAND, PER_THREAD, Thread, inline, reference
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import DEPTH, LARGE, SMALL, Tiles
from jaxmoe.ops.schedule import Schedule
from jaxmoe.parameters import NF4_BLOCK


def coded(stack: NF4Stack, offset: Any, experts: int) -> Coded:
    """The codes of a stack, uint8 [groups, out, inner / 2], and the scales of this many groups from `offset` on,
    float32 [experts, inner / 64, out]."""
    groups, out, inner = stack.shape
    scales = stack.scales(offset + jnp.arange(experts)).reshape(experts, out, inner // NF4_BLOCK)
    return Coded(stack.codes.reshape(groups, out, inner // 2), scales.transpose(0, 2, 1))


class NF4Form:
    """`Form` of weights in NF4."""

    name = "nf4"
    table = NF4_TABLE

    def sides(self, coded: Coded) -> tuple[int, int]:
        """As `Form.sides`."""
        _, out, half = coded.codes.shape
        return out, 2 * half

    def memory(self, plan: Plan, slots: int) -> Coded:
        """As `Form.memory`."""
        width = plan.tiles.columns
        if plan.transposed:
            codes = plgpu.SMEM((slots, width, DEPTH // 2), jnp.uint8)
            return Coded(codes, plgpu.SMEM((slots, width), jnp.float32))
        codes = shared_memory((slots, DEPTH, width // 2), jnp.uint8, 64)
        return Coded(codes, plgpu.SMEM((slots, width // NF4_BLOCK, DEPTH), jnp.float32))

    def pieces(self, plan: Plan, source: Source, group: Array, k: Array) -> Iterator[Piece]:
        """As `Form.pieces`."""
        width, depth = plan.tile_columns, pl.ds(k * DEPTH, DEPTH)
        if not plan.transposed:
            columns = pl.ds(pl.multiple_of(lax.div(source.column, jnp.int32(2)), width // 2), width // 2)
            yield Piece(True, (source.group, depth, columns))
            blocks = pl.ds(lax.div(source.column, jnp.int32(NF4_BLOCK)), width // NF4_BLOCK)
            yield Piece(False, (group, blocks, depth))
            return
        for half in range(2 if plan.swiglu else 1):  # the gate's columns, then those of up
            columns, at = pl.ds(half * plan.columns + source.column, width), pl.ds(half * width, width)
            yield Piece(True, (source.group, columns, pl.ds(k * (DEPTH // 2), DEPTH // 2)), (at,))
            yield Piece(False, (group, k, columns), (at,))

    def operand(self, plan: Plan, memory: Coded, slot: Array, column: Array, table: Array | None) -> Array:
        """As `Form.operand`."""
        if not plan.transposed:
            scales = memory.scales.at[slot, lax.div(column, jnp.int32(NF4_BLOCK))]
            return _decoded_across(memory.codes.at[slot], scales, table)
        part = slot, pl.ds(column, 64)
        return _decoded_along(memory.codes.at[part], memory.scales.at[part], table)

    def pair(self, at: Thread) -> Any:
        """As `Form.pair`: 32 columns of every two warps, four of each m, of which each warp has two."""
        columns = at.plus(at.times(at.shifted(at.warp, 1), 64), at.times(at.row, 8))
        return at.plus(columns, at.times(at.masked(at.warp, 1), 4))


NF4_FORM = NF4Form()


@inline(arg_types=(plgpu.RefType(), plgpu.RefType(), PER_THREAD), return_type=OPERAND)
def _decoded_along(_: Any, codes: Any, scales: Any, table: Any) -> Any:
    """The weights [64, 64] of codes [64, 32], whose second axis is contracted, and scales [64] of the first."""
    at, words = Thread(), np.empty((8, 2), object)
    values = at.in_lanes(table)
    bit = at.times(at.place, 8)  # of the second of the thread's two codes in a word
    for half in range(2):
        row = at.plus(at.plus(at.times(at.warp, 16), at.row), 8 * half)
        scale = at.load(scales, row, at.f32)
        for quarter in range(2):
            byte = at.plus(at.times(row, NF4_BLOCK // 2), 16 * quarter)
            loaded = at.load(codes, byte, at.i32, 4, alignment=16)
            for n in range(4):
                second = at.shifted(at.element(loaded, n), bit)
                pair = (at.scaled(at.looked_up(values, code), scale) for code in (at.shifted(second, 4), second))
                words[4 * quarter + n, half] = at.rounded(*pair)
    return at.operand(words)


@inline(arg_types=(reference(dtype=jnp.uint8, swizzle=64), plgpu.RefType(), PER_THREAD), return_type=OPERAND)
def _decoded_across(_: Any, codes: Any, scales: Any, table: Any) -> Any:
    """The weights [64, 64] of codes [64, 64], whose first axis is contracted, and scales [64] of that axis.

    Each of the two consumers uses half of the codes of a row.
    """
    at, words = Thread(), np.empty((8, 2), object)
    values = at.in_lanes(table)
    group = at.plus(at.times(at.warpgroup, 2), at.shifted(at.warp, 1))  # of 32 columns, 16 bytes
    swizzled = at.xor(group, at.masked(at.shifted(at.lane, 1), 3))
    byte = at.plus(at.times(at.lane, 64), at.times(swizzled, 16))
    bit = at.times(at.masked(at.warp, 1), 8)
    for part in range(2):
        for quarter, loaded in enumerate(at.load_transposed(codes, at.plus(byte, part * 32 * 64))):
            word, eighth = at.shifted(loaded, bit), 4 * part + quarter
            both = at.load(scales, at.plus(at.times(at.place, 2), 8 * eighth), at.f32, 2, alignment=8)
            for half, shift in ((0, 4), (1, 0)):  # the first of two codes has the higher bits
                found = (at.looked_up(values, at.shifted(word, shift + 16 * n)) for n in range(2))
                words[eighth, half] = at.rounded(*(at.scaled(v, at.element(both, n)) for n, v in enumerate(found)))
    return at.operand(words)


# (rows of a span, tiles): the first is for at least so many rows an expert. Each height costs time to compile, and with
# five ptxas runs out of registers.
_MANY = 256
_ALONG = {_MANY: (LARGE, Tiles(128, (128, 192, 224, 256), 4)), 96: (LARGE, Tiles(128, (64, 128, 192, 256), 4))}
_ALONG_FEW = SMALL, Tiles(256, (64, 96, 128), 6)
_ACROSS_FEW = SMALL, Tiles(128, (32, 64, 96, 128), 8)


def fitting_tiles(schedule: Schedule, *, transposed: bool, swiglu: bool) -> tuple[int, Tiles]:
    """The spans' limit and the fastest tiles measured for these rows (docs/log)."""
    mean = schedule.destination.size // schedule.first_tile.shape[0]
    if not swiglu and LARGE in schedule.spans:
        for least, found in _ALONG.items():
            if mean >= least:
                return found
    return _ALONG_FEW if transposed else _ACROSS_FEW


class InRegisters:
    """The implementation "mosaic" of products with experts in NF4."""

    def unsupported(self, dtype: Any, stack: NF4Stack) -> str | None:
        """Why it cannot multiply rows of this dtype with this stack, or None; on a GPU it first runs a small case."""
        if jnp.dtype(dtype) != jnp.bfloat16 or stack.dtype != jnp.bfloat16:
            return f"needs bfloat16, found {jnp.dtype(dtype).name} and {stack.dtype}"
        if stack.places is not None:
            return "needs stacks whose layers are all in NF4"
        sides = stack.shape[1] // stack.codes.shape[1], stack.shape[2]
        if any(side % (2 * DEPTH) for side in sides):
            return f"needs sides that are multiples of {2 * DEPTH}, found {sides[0]} by {sides[1]}"
        return _small_case()

    def faster(self, schedule: Schedule, low: LowRankTerm | None, *, swiglu: bool) -> bool:
        """For any number of rows, with a low-rank term of rank 64 or none. SwiGLU has not been measured."""
        return not swiglu and (low is None or low.rows.shape[1] == RANK)

    def matmul(
        self,
        x: Array,
        stack: NF4Stack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool,
        low: LowRankTerm | None = None,
    ) -> Float[Array, "P out"]:
        """As `CodedProducts.matmul`."""
        rows, tiles = fitting_tiles(schedule, transposed=transposed, swiglu=swiglu)
        weight = coded(stack, offset, schedule.first_tile.shape[0])
        options: Any = {"transposed": transposed, "swiglu": swiglu, "low": low, "tiles": tiles}
        return grouped_matmul(x, weight, NF4_FORM, schedule.spans[rows], offset, **options)


@cache
def _small_case() -> str | None:
    return why_not(partial(small_case_equal, low_rank=True))


def small_case_equal(*, low_rank: bool = False) -> bool:
    """`has_decoded_bits` of random codes."""
    keys = jax.random.split(jax.random.key(0))
    side = 2 * DEPTH
    codes = jax.random.bits(keys[0], (2, 1, side * side // 2), jnp.uint8)
    absmax = jax.random.uniform(keys[1], (2, 1, side * side // NF4_BLOCK), jnp.float32)
    stack = NF4Stack(codes, absmax, None, None, None, (2, side, side), jnp.dtype(jnp.bfloat16))
    return has_decoded_bits(stack, lambda stack, transposed: coded(stack, 1, 1), NF4_FORM, low_rank=low_rank)


IN_REGISTERS = InRegisters()
