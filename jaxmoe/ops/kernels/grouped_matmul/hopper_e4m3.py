"""The Hopper kernel's products with experts in FP8, decoded in registers: e4m3 codes with a scale per 128 x 128.

`hopper_decoding` has the kernel. An operand of 64 columns and 64 of the contracted axis has one scale. Two codes become
two float16 values in one instruction, exactly; each is widened, multiplied by the scale in float32, and both are
rounded together.

x W^T: codes follow each other along the contracted axis. Four threads share a row, and the q-th takes bytes 2q and
2q + 1 of every eight.

x W: codes follow each other along the result's columns. `ldmatrix` with transposition takes a pair of bytes, two
columns, as one element, and gives each thread those of two neighbours along the contracted axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from jaxmoe.fp8.codec import E4M3
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.implementations import choose
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
from jaxmoe.ops.kernels.grouped_matmul.hopper_thread import OPERAND, Thread, inline, reference
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import DEPTH, LARGE, SMALL, Tiles
from jaxmoe.ops.schedule import Schedule
from jaxmoe.ops.swiglu import swiglu_of_product
from jaxmoe.parameters import FP8_BLOCK

_COPIES = 32  # of a scale: shared memory that TMA fills begins at multiples of 128 bytes


def coded(stack: FP8Stack, offset: Any, experts: int, *, transposed: bool) -> Coded:
    """The codes of a stack, and the scales of this many groups from `offset` on.

    The scales are float32 [experts, blocks of the contracted axis, blocks of the result's columns, copies].
    """
    scales = lax.dynamic_slice_in_dim(stack.scales, jnp.asarray(offset, jnp.int32), experts).astype(jnp.float32)
    scales = scales.reshape(experts, -1, scales.shape[-1])  # the blocks of gate and of up follow each other
    scales = scales.swapaxes(1, 2) if transposed else scales
    return Coded(stack.codes, jnp.broadcast_to(scales[..., None], (*scales.shape, _COPIES)))


class E4M3Form:
    """`Form` of weights in FP8."""

    name = "e4m3"
    table = None

    def sides(self, coded: Coded) -> tuple[int, int]:
        """As `Form.sides`."""
        _, out, inner = coded.codes.shape
        return out, inner

    def memory(self, plan: Plan, slots: int) -> Coded:
        """As `Form.memory`."""
        width = plan.tiles.columns
        along = plan.transposed
        codes = shared_memory((slots, width, DEPTH) if along else (slots, DEPTH, width), E4M3, 64 if along else 128)
        return Coded(codes, plgpu.SMEM((slots, width // FP8_BLOCK, _COPIES), jnp.float32))

    def pieces(self, plan: Plan, source: Source, group: Array, k: Array) -> Iterator[Piece]:
        """As `Form.pieces`."""
        width, depth, block = plan.tile_columns, pl.ds(k * DEPTH, DEPTH), lax.div(k * DEPTH, jnp.int32(FP8_BLOCK))
        blocks = width // FP8_BLOCK
        for half in range(2 if plan.swiglu else 1):  # the gate's columns, then those of up
            first = half * plan.columns + source.column
            columns, at = pl.ds(first, width), pl.ds(half * width, width)
            if plan.transposed:
                yield Piece(True, (source.group, columns, depth), (at,))
            else:
                yield Piece(True, (source.group, depth, columns))
            in_blocks = pl.ds(lax.div(first, jnp.int32(FP8_BLOCK)), blocks)
            yield Piece(False, (group, block, in_blocks), (pl.ds(half * blocks, blocks),))

    def operand(self, plan: Plan, memory: Coded, slot: Array, column: Array, table: Array | None) -> Array:
        """As `Form.operand`."""
        scale = memory.scales.at[slot, lax.div(column, jnp.int32(FP8_BLOCK))]
        if plan.transposed:
            return _decoded_along(memory.codes.at[slot, pl.ds(column, 64)], scale)
        return _decoded_across(memory.codes.at[slot], scale)

    def pair(self, at: Thread) -> Any:
        """As `Form.pair`: 16 columns of each warp, two of each m."""
        return at.plus(at.times(at.warp, 32), at.times(at.row, 4))


E4M3_FORM = E4M3Form()


def words_along(at: Thread, codes: Any, scale: Any) -> np.ndarray:
    """The operand's words [8, 2] from codes [64, 64], whose second axis is contracted, in a swizzle of 64 bytes."""
    words = np.empty((8, 2), object)
    own = at.plus(at.times(at.place, 0x22), 0x10)  # of eight bytes those at 2 place and 2 place + 1
    for half in range(2):
        row = at.plus(at.plus(at.times(at.warp, 16), at.row), 8 * half)
        for quarter in range(4):
            chunk = at.xor(at.shifted(at.row, 1), quarter)
            loaded = at.load(codes, at.plus(at.times(row, 64), at.times(chunk, 16)), at.i32, 4, alignment=16)
            for n in range(2):
                pair = at.bytes_of(at.element(loaded, 2 * n), at.element(loaded, 2 * n + 1), own)
                words[2 * quarter + n, half] = at.rounded(*(at.scaled(value, scale) for value in at.widened(pair, 0)))
    return words


def words_across(at: Thread, codes: Any, scale: Any) -> np.ndarray:
    """The operand's words [8, 2] from codes [64, 128], whose first axis is contracted, in a swizzle of 128 bytes.

    Each of the two consumers uses half of a row.
    """
    words = np.empty((8, 2), object)
    chunk = at.xor(at.plus(at.times(at.warpgroup, 4), at.warp), at.masked(at.lane, 7))
    byte = at.plus(at.times(at.lane, 128), at.times(chunk, 16))
    for part in range(2):
        for n, word in enumerate(at.load_transposed(codes, at.plus(byte, part * 32 * 128))):
            pairs = [[at.scaled(value, scale) for value in at.widened(word, half)] for half in range(2)]
            for half in range(2):
                words[4 * part + n, half] = at.rounded(pairs[0][half], pairs[1][half])
    return words


@inline(arg_types=(reference(dtype=E4M3, swizzle=64), plgpu.RefType()), return_type=OPERAND)
def _decoded_along(_: Any, codes: Any, scales: Any) -> Any:
    """The weights [64, 64] of codes [64, 64]."""
    at = Thread()
    return at.operand(words_along(at, codes, at.load(scales, at.number(0), at.f32)))


@inline(arg_types=(reference(dtype=E4M3, swizzle=128), plgpu.RefType()), return_type=OPERAND)
def _decoded_across(_: Any, codes: Any, scales: Any) -> Any:
    """The weights [64, 64] of codes [64, 128]."""
    at = Thread()
    return at.operand(words_across(at, codes, at.load(scales, at.number(0), at.f32)))


# (rows of a span, tiles) for at least so many rows an expert, and for fewer. Each height costs time to compile.
_FUSED_BELOW = 256  # rows an expert; with more, tiles without SwiGLU and a pass of their own for it are faster
_MANY = {256: (LARGE, Tiles(128, (128, 192, 224, 256), 4)), 96: (LARGE, Tiles(128, (64, 128, 192, 256), 4))}
_ALONG_FEW = SMALL, Tiles(256, (64, 96, 128), 5)
_ACROSS_FEW = SMALL, Tiles(128, (32, 64, 96, 128), 7)


def fitting_tiles(schedule: Schedule, *, transposed: bool, swiglu: bool) -> tuple[int, Tiles]:
    """The spans' limit and the tiles for these rows."""
    mean = schedule.destination.size // schedule.first_tile.shape[0]
    if LARGE in schedule.spans and not swiglu:
        for least, found in _MANY.items():
            if mean >= least:
                return found
    return _ALONG_FEW if transposed else _ACROSS_FEW


class Registers:
    """The implementation "registers" of products with experts in FP8."""

    def unsupported(self, dtype: Any, stack: FP8Stack) -> str | None:
        """Why it cannot multiply rows of this dtype with this stack, or None; on a GPU it first runs a small case."""
        if jnp.dtype(dtype) != jnp.bfloat16 or stack.dtype != jnp.bfloat16:
            return f"needs bfloat16, found {jnp.dtype(dtype).name} and {stack.dtype}"
        if stack.places is not None:
            return "needs stacks whose layers are all in FP8"
        sides = stack.shape[1] // stack.scales.shape[-3], stack.shape[2]
        if any(side % FP8_BLOCK for side in sides):
            return f"needs matrices of whole blocks of 128 by 128, found {sides[0]} by {sides[1]}"
        if (selected := choose("grouped_matmul", dtype).name) != "mosaic":
            return f"needs grouped matmul by mosaic, found {selected}"
        return _small_case()

    def faster(self, schedule: Schedule, low: LowRankTerm | None, *, swiglu: bool) -> bool:
        """True, except with high ranks."""
        return low is None or low.rows.shape[1] == RANK

    def matmul(
        self,
        x: Array,
        stack: FP8Stack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool,
        low: LowRankTerm | None = None,
    ) -> Float[Array, "P out"]:
        """As `CodedProducts.matmul`."""
        experts = schedule.first_tile.shape[0]
        fused = swiglu and low is None and schedule.destination.size < _FUSED_BELOW * experts
        rows, tiles = fitting_tiles(schedule, transposed=transposed, swiglu=fused)
        weight = coded(stack, offset, experts, transposed=transposed)
        options: Any = {"transposed": transposed, "swiglu": fused, "low": low, "tiles": tiles}
        y = grouped_matmul(x, weight, E4M3_FORM, schedule.spans[rows], offset, **options)
        return swiglu_of_product(y) if swiglu and not fused else y


@cache
def _small_case() -> str | None:
    return why_not(small_case_equal)


def small_case_equal() -> bool:
    """`has_decoded_bits` of all finite codes, in four blocks, with a low-rank term."""
    keys = jax.random.split(jax.random.key(0))
    side = 2 * FP8_BLOCK
    codes = jax.random.randint(keys[0], (2, side, side), 0, 254).astype(jnp.uint8)
    codes = lax.bitcast_convert_type(codes + (codes >= 127).astype(jnp.uint8), E4M3)  # 127 and 255 are not numbers
    scales = jax.random.uniform(keys[1], (2, 1, 2, 2), jnp.float32)
    stack = FP8Stack(codes, scales, (2, side, side), jnp.dtype(jnp.bfloat16))
    weight = lambda stack, transposed: coded(stack, 1, 1, transposed=transposed)
    return has_decoded_bits(stack, weight, E4M3_FORM, low_rank=True)


REGISTERS = Registers()
