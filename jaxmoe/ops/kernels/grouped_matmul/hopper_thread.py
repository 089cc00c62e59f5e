"""Code of one thread of a multiplying warpgroup, for kernels that make wgmma's left operand in registers.

wgmma gives each thread of its left operand [64, 64] two rows, m and m + 8 of its warp's sixteen, and of each row two
neighbours in every eight of the contracted axis.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import shared_memory

_language: Any = plgpu  # its types do not say what its decorators return
inline = _language.inline_mgpu
WARPGROUP = 128  # threads
PER_THREAD = plgpu.Layout.WG_STRIDED((WARPGROUP,), vec_size=1)
OPERAND = plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=plgpu.Layout.WGMMA)


def reference(*, dtype: Any, swizzle: int) -> Any:
    """What `inline` says of swizzled shared memory."""
    return plgpu.RefType(shared_memory((64, 64), dtype, swizzle).transforms)


class Thread:
    """What a thread computes, written while the kernel is translated."""

    def __init__(self):
        self.i8, self.i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        self.f32, self.bf16 = ir.F32Type.get(), ir.BF16Type.get()
        number = utils.thread_idx()
        thread = self.masked(number, WARPGROUP - 1)
        self.warpgroup = self.shifted(number, 7)
        self.warp, self.lane = self.shifted(thread, 5), self.masked(thread, 31)
        self.row = self.shifted(self.lane, 2)  # m of the operand
        self.place = self.masked(self.lane, 3)  # among the four threads of a row

    def number(self, value: int) -> Any:
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, value))

    def plus(self, value: Any, other: Any) -> Any:
        return arith.addi(value, self.number(other) if isinstance(other, int) else other)

    def times(self, value: Any, factor: int) -> Any:
        return arith.muli(value, self.number(factor))

    def masked(self, value: Any, mask: int) -> Any:
        return arith.andi(value, self.number(mask))

    def xor(self, value: Any, other: Any) -> Any:
        return arith.xori(value, self.number(other) if isinstance(other, int) else other)

    def shifted(self, word: Any, bits: Any) -> Any:
        return arith.shrui(word, self.number(bits) if isinstance(bits, int) else bits)

    def element(self, vector_of: Any, n: int) -> Any:
        return vector.extract(vector_of, [], ir.DenseI64ArrayAttr.get([n]))

    def load(self, ref: Any, index: Any, kind: Any, count: int = 1, alignment: int | None = None) -> Any:
        """`count` values of `kind` from shared memory, at an index in bytes or, of float32, in values."""
        of = kind if kind is self.f32 else self.i8
        address = utils.getelementptr(utils.memref_ptr(ref), [index], of)
        return llvm.load(kind if count == 1 else ir.VectorType.get((count,), kind), address, alignment=alignment)

    def load_transposed(self, ref: Any, byte: Any) -> list[Any]:
        """Four words by `ldmatrix`, each of a matrix [8, 8] of 16-bit elements: those at [2 place, row] and at
        [2 place + 1, row].

        `byte` is where row `lane` of the four matrices, one below the other, begins.
        """
        address = llvm.ptrtoint(self.i32, utils.getelementptr(utils.memref_ptr(ref), [byte], self.i8))
        four: Any = llvm.inline_asm(
            ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
            [address],
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r,~{memory}",
            has_side_effects=True,
        )
        return [llvm.extractvalue(self.i32, four, [n]) for n in range(4)]

    def bytes_of(self, first: Any, second: Any, selector: Any) -> Any:
        """Four of the eight bytes of two words; `selector` has the number of each in four bits, the lowest first."""
        selector = self.number(selector) if isinstance(selector, int) else selector
        return llvm.inline_asm(self.i32, [first, second, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")

    def in_lanes(self, values: Any) -> Any:
        """The word that each thread holds of float32 values, one a thread, for `looked_up`."""
        return arith.bitcast(self.i32, self.element(values.registers.flat[0], 0))

    def looked_up(self, values: Any, lane: Any) -> Any:
        """The float32 value of another lane of the warp, whose number are the five lowest bits of a word."""
        found = nvvm.shfl_sync(self.number(-1), values, lane, self.number(31), nvvm.ShflKind.idx)
        return arith.bitcast(self.f32, found)

    def widened(self, codes: Any, half: int) -> tuple[Any, Any]:
        """The float32 values of two e4m3 codes, in this half of a word."""
        own, other = ("own", "other") if half == 0 else ("other", "own")
        text = f"{{.reg .b16 own, other; mov.b32 {{{own}, {other}}}, $1; cvt.rn.f16x2.e4m3x2 $0, own;}}"
        pair: Any = llvm.inline_asm(self.i32, [codes], text, "=r,r")
        one, two = ir.VectorType.get((1,), self.i32), ir.VectorType.get((2,), ir.F16Type.get())
        both = vector.bitcast(two, vector.broadcast(one, pair))
        first, second = (arith.extf(self.f32, self.element(both, n)) for n in range(2))
        return first, second

    def scaled(self, value: Any, scale: Any) -> Any:
        return arith.mulf(value, scale)

    def rounded(self, first: Any, second: Any) -> Any:
        """Two float32 values as two bfloat16 values in a word, the first one in the lower half."""
        return llvm.inline_asm(self.i32, [second, first], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")

    def operand(self, words: np.ndarray) -> Any:
        """The left operand of words [8, 2]: two neighbours in the n-th eight, of rows m and m + 8."""
        one, pair = ir.VectorType.get((1,), self.i32), ir.VectorType.get((2,), self.bf16)
        registers = np.empty(words.shape, object)
        for place, word in np.ndenumerate(words):
            registers[place] = vector.bitcast(pair, vector.broadcast(one, word))
        layout = mgpu.WGMMA_LAYOUT
        registers = registers.reshape(layout.registers_shape((64, 64)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)
