"""Weights of NF4 and FP8 codes in registers, for products of few rows: 8 neighbours of each thread (`row_tiles`).

The value of a code times its block's scale in float32, rounded once; two neighbours are rounded together.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector
from jaxtyping import Array

from jaxmoe.ops.kernels import row_tiles
from jaxmoe.ops.kernels.grouped_matmul.hopper_thread import PER_THREAD, Thread
from jaxmoe.parameters import FP8_BLOCK, NF4_BLOCK, NF4_NESTED_BLOCK

plgpu: Any = mosaic_gpu
_SPLAT = plgpu.Layout.WG_SPLAT


class _Lane(Thread):
    """What a thread computes of a tile of weights [count, width]."""

    def __init__(self, width: int, dtype: Any):
        super().__init__()
        per_row = width // row_tiles.VECTOR
        bits = per_row.bit_length() - 1
        self.rows = row_tiles.rows_of(width)
        self.in_tile = self.plus(self.times(self.warp, self.rows // 4), self.shifted(self.lane, bits))
        self.first = self.times(self.masked(self.lane, per_row - 1), row_tiles.VECTOR)  # of the thread's weights
        self.width, self.dtype = width, dtype

    def column(self, number: int) -> Any:
        """The column of the tile's register `number`."""
        return self.plus(self.in_tile, number * self.rows)

    def at(self, ref: Any, *place: Any) -> Any:
        """A number in memory."""
        index = ir.IndexType.get()
        return memref.load(ref, [arith.index_cast(index, each) for each in place])

    def float32(self, value: Any) -> Any:
        return value if value.type == self.f32 else arith.extf(self.f32, value)

    def rounded(self, first: Any, second: Any) -> Any:
        """Two float32 values rounded, in a word, the first one in the lower half."""
        kind = "bf16x2" if self.dtype == jnp.bfloat16 else "f16x2"
        return llvm.inline_asm(self.i32, [second, first], f"cvt.rn.{kind}.f32 $0, $1, $2;", "=r,f,f")

    def words(self, loaded: Any, count: int) -> list[Any]:
        """The words of the bytes that a thread has loaded."""
        words = vector.bitcast(ir.VectorType.get((count,), self.i32), loaded)
        return [self.element(words, n) for n in range(count)]

    def weights(self, tiles: list[list[Any]], count: int) -> Any:
        """The tile of words, four for each register."""
        layout = row_tiles.layout(self.width).to_mgpu()
        kind = ir.BF16Type.get() if self.dtype == jnp.bfloat16 else ir.F16Type.get()
        four, eight = ir.VectorType.get((4,), self.i32), ir.VectorType.get((row_tiles.VECTOR,), kind)
        registers = np.empty(len(tiles), object)
        for n, words in enumerate(tiles):
            registers[n] = vector.bitcast(eight, vector.from_elements(four, words))
        shape = layout.registers_shape((count, self.width))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


def _scalar(value: Any) -> Any:
    return value.registers.item() if isinstance(value, mgpu.FragmentedArray) else value


def nf4(codes: Array, scales: Any, nested: tuple[Any, ...], table: Any, shape: tuple[int, int], dtype: Any) -> Array:
    """The weights [count, width] of codes [count, width / 2].

    Args:
        codes: as `few_rows_mosaic.load_bytes` loads them.
        scales: a reference to the blocks' [count, width / 64].
        nested: nothing; or references to the scales of the second quantisation, its offset, a reference to its table,
            the number of the first block among those of the matrix, and the blocks of a row.
        table: a reference to NF4's, a value for each thread.
        shape: count, width.
        dtype: of the weights.
    """
    count, width = shape
    ref, splat = plgpu.RefType(), _SPLAT
    values = plgpu.load(table, layout=PER_THREAD, optimized=False)
    types = [row_tiles.layout(width // 2, row_tiles.VECTOR // 2), PER_THREAD, ref]
    more, in_row = [], 0
    if nested:
        outer, offset, quant_map, first, in_row = nested
        more, types = [outer, quant_map, offset, first], [*types, ref, ref, splat, splat]

    result = plgpu.ShapeDtypeStruct(shape, dtype, layout=row_tiles.layout(width))

    @plgpu.inline_mgpu(arg_types=tuple(types), return_type=result)
    def decoded(_: Any, codes: Any, values: Any, scales: Any, *nested: Any) -> Any:
        at, tiles = _Lane(width, dtype), []
        own = at.in_lanes(values)
        block = at.shifted(at.first, NF4_BLOCK.bit_length() - 1)
        for n, loaded in enumerate(codes.registers.flat):
            column = at.column(n)
            scale = at.at(scales, column, block)
            if nested:
                outer, quant_map, offset, first = nested
                place = at.plus(at.plus(at.times(column, in_row), block), _scalar(first))
                outer_scale = at.at(outer, at.shifted(place, NF4_NESTED_BLOCK.bit_length() - 1))
                value = at.at(quant_map, arith.extui(at.i32, scale))
                # No compiler may fuse product and sum into one multiply-add, whose last bit would differ.
                text = "{.reg .f32 p; mul.rn.f32 p, $1, $2; add.rn.f32 $0, p, $3;}"
                scale = llvm.inline_asm(at.f32, [value, outer_scale, _scalar(offset)], text, "=f,f,f,f")
            (word,), words = at.words(loaded, 1), []
            for byte in range(4):
                pair = [at.looked_up(own, at.shifted(word, 8 * byte + shift)) for shift in (4, 0)]
                words.append(at.rounded(*(at.scaled(value, scale) for value in pair)))
            tiles.append(words)
        return at.weights(tiles, count)

    return decoded(codes, values, scales, *more)


def fp8(codes: Array, scales: Any, shape: tuple[int, int], dtype: Any) -> Array:
    """The weights [count, width] of codes in e4m3 [count, width]; `scales` is a reference to those of the blocks."""
    count, width = shape
    result = plgpu.ShapeDtypeStruct(shape, dtype, layout=row_tiles.layout(width))

    @plgpu.inline_mgpu(arg_types=(row_tiles.layout(width), plgpu.RefType()), return_type=result)
    def decoded(_: Any, codes: Any, scales: Any) -> Any:
        at, tiles = _Lane(width, dtype), []
        scale = at.float32(at.at(scales, at.shifted(at.first, FP8_BLOCK.bit_length() - 1)))
        for loaded in codes.registers.flat:
            words = []
            for word in at.words(loaded, 2):
                for half in range(2):
                    words.append(at.rounded(*(at.scaled(value, scale) for value in at.widened(word, half))))
            tiles.append(words)
        return at.weights(tiles, count)

    return decoded(codes, scales)
