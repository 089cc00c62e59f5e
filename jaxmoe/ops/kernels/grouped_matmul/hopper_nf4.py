"""Grouped matmul for Hopper whose weights are NF4 codes: they are decoded in registers, as wgmma's left operand.

    out[rows of a span] = x[rows of the span] @ W[group of the span]^T     (or W)

`hopper_matmul` explains items, spans and the ring; only what differs is here. A step brings 64 of the contracted axis:
rows of x, codes and scales. A consumer decodes an operand [64, 64], 64 columns of the result: the value of a code times
the scale in float32, rounded once, with the bits of `jaxmoe.nf4.codec.decode`. While a product runs, the next operand
is decoded.

wgmma gives each thread of its left operand two rows, m and m + 8, and of each row two neighbours in every eight of the
contracted axis. The 16 values of NF4 lie in the lanes of a warp, twice; a shuffle looks a code up by the five lowest
bits, of which the fifth does not matter.

x W^T: codes follow each other along the contracted axis. Eight of them are a word of four bytes, and a thread's two are
byte q of it, for the q-th thread of the four that share a row. It reads whole rows and shifts.

x W: codes follow each other along the result's columns. `ldmatrix` with transposition takes a pair of bytes, four
columns, as one element, and gives each thread those of two neighbours along the contracted axis. Two warps share them,
and one byte is the columns of rows m and m + 8. So the operand's rows are not in the order of the result's columns;
they are put in order on the way to shared memory.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector
from jaxtyping import Array, Float, UInt8

from jaxmoe.nf4.codec import NF4_TABLE
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.kernels.grouped_matmul.hopper_matmul import Plan, Program, Share, Source, Work
from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import CONSUMERS, Ring, launch, run_warpgroups, shared_memory
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import DEPTH, LARGE, SMALL, Tiles
from jaxmoe.ops.schedule import Schedule, Spans
from jaxmoe.parameters import NF4_BLOCK

RANK = 64  # of a low-rank term
_language: Any = plgpu  # its types do not say what its decorators return
_inline = _language.inline_mgpu
_WARPGROUP = 128  # threads
# Of producer and consumer. With fewer, ptxas waits for each product before it decodes on ("serialized").
_REGISTERS = 24, 240
_PER_THREAD = plgpu.Layout.WG_STRIDED((_WARPGROUP,), vec_size=1)


def _transforms(dtype: Any, swizzle: int) -> tuple[Any, ...]:
    return shared_memory((64, 64), dtype, swizzle).transforms


class Codes(NamedTuple):
    """Matrices [groups, out, inner] in NF4: codes uint8 [groups, out, inner / 2] of all layers, and the scales float32
    [E, inner / 64, out] of this layer's."""

    codes: UInt8[Array, "groups out bytes"]
    scales: Float[Array, "E blocks out"]

    @classmethod
    def of(cls, stack: NF4Stack, offset: Any, experts: int) -> Codes:
        """The codes of a stack, and the scales of this many groups from `offset` on."""
        groups, out, inner = stack.shape
        scales = stack.scales(offset + jnp.arange(experts)).reshape(experts, out, inner // NF4_BLOCK)
        return cls(stack.codes.reshape(groups, out, inner // 2), scales.transpose(0, 2, 1))


@dataclass(frozen=True)
class _Program(Program):
    """One thread block. `weights` are codes; `values` gives each thread the value of its lane; `low` holds the weights
    of the low-rank term."""

    scales: Any
    values: Any
    low: Any

    def load(self, pair: tuple[Any, Any], source: Source, start: Array, k: Array) -> None:
        """Copies step k: DEPTH columns of the rows, and the codes that multiply them with their scales, or the weights
        of the low-rank term."""
        plan, (left, weights) = self.plan, pair
        slot = self.ring.wait_until_free(start + k)
        filled = self.ring.filled.at[slot]
        rows = left.at[pl.ds(source.row, plan.highest), pl.ds(k * DEPTH, DEPTH)]
        plgpu.copy_gmem_to_smem(rows, self.rows.at[slot], filled)
        width = plan.tile_columns
        if not isinstance(weights, Codes):
            for half in range(2):  # so that every step has as many copies
                part = (width if plan.transposed else DEPTH) // 2
                at, columns, depth = pl.ds(half * part, part), pl.ds(source.column, width), pl.ds(k * DEPTH, DEPTH)
                if plan.transposed:
                    columns = pl.ds(source.column + half * part, part)
                else:
                    depth = pl.ds(k * DEPTH + half * part, part)
                place = (columns, depth) if plan.transposed else (depth, columns)
                plgpu.copy_gmem_to_smem(weights.at[(source.group, *place)], self.low.at[at], filled)
            return
        codes: Any = weights.codes
        scales: Any = weights.scales
        group = source.group - self.work.offset[0]
        if not plan.transposed:
            depth = pl.ds(k * DEPTH, DEPTH)
            columns = pl.ds(pl.multiple_of(lax.div(source.column, jnp.int32(2)), width // 2), width // 2)
            plgpu.copy_gmem_to_smem(codes.at[source.group, depth, columns], self.weights.at[slot], filled)
            blocks = pl.ds(lax.div(source.column, jnp.int32(NF4_BLOCK)), width // NF4_BLOCK)
            plgpu.copy_gmem_to_smem(scales.at[group, blocks, depth], self.scales.at[slot], filled)
            return
        for half in range(2 if plan.swiglu else 1):  # the gate's columns, then those of up
            columns, at = pl.ds(half * plan.columns + source.column, width), pl.ds(half * width, width)
            place = pl.ds(k * (DEPTH // 2), DEPTH // 2)
            plgpu.copy_gmem_to_smem(codes.at[source.group, columns, place], self.weights.at[slot, at], filled)
            plgpu.copy_gmem_to_smem(scales.at[group, k, columns], self.scales.at[slot, at], filled)

    def multiply(self, start: Array, height: int) -> tuple[Array, ...]:
        """The sums of one item, transposed: [64, height] in float32 for each product."""
        plan = self.plan
        # Two operands at least are written in turn, so that one can be decoded while the product of the other runs.
        together = 2 if plan.products == 1 else 1
        values = _language.load(self.values, layout=_PER_THREAD, optimized=False)

        def accumulate(*sums: Any) -> tuple[Array, ...]:
            decoded = plan.pair_steps[0]

            @pl.loop(0, decoded // together)
            def _steps(k: Array) -> None:
                for extra in range(together):
                    step = k * together + extra
                    slot = self.ring.wait_until_filled(start + step)
                    rows = self.rows.at[slot, pl.ds(0, height)].transpose((1, 0))
                    for n, acc in enumerate(sums):
                        plgpu.wgmma(acc, self._operand(slot, n, values), rows)
                        plgpu.wgmma_wait(1)
                        if n == 0:  # the products of the step before have ended
                            pl.when(step > 0)(partial(self.ring.arrive, start + step - 1))

            if plan.steps > decoded:
                plgpu.wgmma_wait(0)  # otherwise ptxas lets no product overlap with anything
                self.ring.arrive(start + decoded - 1)
                slot = self.ring.wait_until_filled(start + decoded)
                rows = self.rows.at[slot, pl.ds(0, height)].transpose((1, 0))
                for n, acc in enumerate(sums):
                    at = pl.ds(self.product(n), 64)
                    plgpu.wgmma(acc, self.low.at[at] if plan.transposed else _loaded_across(self.low), rows)
            return tuple(acc[...] for acc in sums)

        sums = pl.run_scoped(
            accumulate, *(plgpu.WGMMAAccumulatorRef((64, height), jnp.float32) for _ in range(plan.products))
        )
        self.ring.arrive(start + plan.steps - 1)
        return sums

    def _operand(self, slot: Array, n: int, values: Array) -> Array:
        """The left operand of product n."""
        if not self.plan.transposed:
            return _decoded_across(self.weights.at[slot], self.scales.at[slot, self.warpgroup], values)
        at = self.warpgroup * 64 + n * self.plan.tile_columns if self.plan.swiglu else self.product(n)
        part = slot, pl.ds(at, 64)
        return _decoded_along(self.weights.at[part], self.scales.at[part], values)

    def stage(self, sums: Array, rows: Any) -> None:
        """Puts sums [64, size] into shared memory [size, 64], rounded and with the columns in order."""
        if self.plan.transposed:
            super().stage(sums, rows)
        else:
            _stage_in_order(sums.shape[1])(sums, rows)


class _Thread:
    """Code for one thread of a multiplying warpgroup, written while the kernel is translated."""

    def __init__(self, values: Any = None):
        self.i8, self.i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
        self.f32, self.bf16 = ir.F32Type.get(), ir.BF16Type.get()
        thread = arith.andi(utils.thread_idx(), self.number(_WARPGROUP - 1))
        self.warp, self.lane = self.shifted(thread, 5), arith.andi(thread, self.number(31))
        self.row = self.shifted(self.lane, 2)  # m of the operand, in the eight of a warp
        self.place = arith.andi(self.lane, self.number(3))  # among the four threads of a row
        if values is not None:
            self._value = arith.bitcast(self.i32, self.element(values.registers.flat[0], 0))

    def number(self, value: int) -> Any:
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, value))

    def times(self, value: Any, factor: int) -> Any:
        return arith.muli(value, self.number(factor))

    def shifted(self, word: Any, bits: Any) -> Any:
        return arith.shrui(word, self.number(bits) if isinstance(bits, int) else bits)

    def element(self, vector_of: Any, n: int) -> Any:
        return vector.extract(vector_of, [], ir.DenseI64ArrayAttr.get([n]))

    def load(self, ref: Any, index: Any, kind: Any, count: int = 1, alignment: int | None = None) -> Any:
        """`count` values of `kind` from shared memory, at an index in bytes or, of float32, in values."""
        of = kind if kind is self.f32 else self.i8
        address = utils.getelementptr(utils.memref_ptr(ref), [index], of)
        return llvm.load(kind if count == 1 else ir.VectorType.get((count,), kind), address, alignment=alignment)

    def decoded(self, word: Any, scale: Any) -> Any:
        """The weight, not yet rounded, whose code is the four lowest bits of a word."""
        found = nvvm.shfl_sync(self.number(-1), self._value, word, self.number(31), nvvm.ShflKind.idx)
        return arith.mulf(arith.bitcast(self.f32, found), scale)

    def rounded(self, first: Any, second: Any) -> Any:
        """Two float32 values as two bfloat16 values in a word, the first one in the lower half."""
        return llvm.inline_asm(self.i32, [second, first], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f")

    def operand(self, words: np.ndarray) -> Any:
        """The left operand [64, 64] of words [8, 2]: two neighbours in the n-th eight, of rows m and m + 8."""
        one, pair = ir.VectorType.get((1,), self.i32), ir.VectorType.get((2,), self.bf16)
        registers = np.empty(words.shape, object)
        for place, word in np.ndenumerate(words):
            registers[place] = vector.bitcast(pair, vector.broadcast(one, word))
        layout = mgpu.WGMMA_LAYOUT
        shape = layout.registers_shape((64, NF4_BLOCK))
        return mgpu.FragmentedArray(_registers=registers.reshape(shape), _layout=layout, _is_signed=None)


_OPERAND = plgpu.ShapeDtypeStruct((64, NF4_BLOCK), jnp.bfloat16, layout=plgpu.Layout.WGMMA)


@_inline(arg_types=(plgpu.RefType(), plgpu.RefType(), _PER_THREAD), return_type=_OPERAND)
def _decoded_along(_: Any, codes: Any, scales: Any, values: Any) -> Any:
    """The weights [64, 64] of codes [64, 32], whose second axis is contracted, and scales [64] of the first."""
    at = _Thread(values)
    words = np.empty((8, 2), object)
    bit = at.times(at.place, 8)  # of the second of the thread's two codes in a word
    for half in range(2):
        row = arith.addi(arith.addi(at.times(at.warp, 16), at.row), at.number(8 * half))
        scale = at.load(scales, row, at.f32)
        for quarter in range(2):
            byte = arith.addi(at.times(row, NF4_BLOCK // 2), at.number(16 * quarter))
            loaded = at.load(codes, byte, at.i32, 4, alignment=16)
            for n in range(4):
                second = at.shifted(at.element(loaded, n), bit)
                first = at.shifted(second, 4)
                words[4 * quarter + n, half] = at.rounded(at.decoded(first, scale), at.decoded(second, scale))
    return at.operand(words)


@_inline(arg_types=(plgpu.RefType(_transforms(jnp.uint8, 64)), plgpu.RefType(), _PER_THREAD), return_type=_OPERAND)
def _decoded_across(_: Any, codes: Any, scales: Any, values: Any) -> Any:
    """The weights [64, 64] of codes [64, 64], whose first axis is contracted, and scales [64] of that axis.

    Each of the two consumers uses half of the codes of a row.
    """
    at = _Thread(values)
    words = np.empty((8, 2), object)
    consumer = arith.shrui(utils.thread_idx(), at.number(7))
    group = arith.addi(at.times(consumer, 2), at.shifted(at.warp, 1))  # of 32 columns, 16 bytes
    swizzled = arith.xori(group, arith.andi(at.shifted(at.lane, 1), at.number(3)))
    byte = arith.addi(at.times(at.lane, 64), at.times(swizzled, 16))
    bit = at.times(arith.andi(at.warp, at.number(1)), 8)
    for part in range(2):
        address = utils.getelementptr(utils.memref_ptr(codes), [arith.addi(byte, at.number(part * 32 * 64))], at.i8)
        address = llvm.ptrtoint(at.i32, address)
        four: Any = llvm.inline_asm(
            ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
            [address],
            "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,r,~{memory}",
            has_side_effects=True,
        )
        for n in range(4):
            word = at.shifted(llvm.extractvalue(at.i32, four, [n]), bit)
            eighth = 4 * part + n
            index = arith.addi(at.times(at.place, 2), at.number(8 * eighth))
            both = at.load(scales, index, at.f32, 2, alignment=8)
            for half, shift in ((0, 4), (1, 0)):  # the first of two codes has the higher bits
                first, second = (at.shifted(word, shift + 16 * n) for n in range(2))
                found = at.decoded(first, at.element(both, 0)), at.decoded(second, at.element(both, 1))
                words[eighth, half] = at.rounded(*found)
    return at.operand(words)


@_inline(arg_types=(plgpu.RefType(),), return_type=_OPERAND)
def _loaded_across(_: Any, weights: Any) -> Any:
    """As `_decoded_across`, of weights [64, 128] in bfloat16."""
    at = _Thread()
    words = np.empty((8, 2), object)
    consumer = arith.shrui(utils.thread_idx(), at.number(7))
    byte = arith.addi(at.times(consumer, 128), at.times(at.shifted(at.warp, 1), 64))
    byte = arith.addi(byte, at.times(at.row, 8))
    byte = arith.addi(byte, at.times(arith.andi(at.warp, at.number(1)), 4))
    byte = arith.addi(byte, at.times(at.place, 2 * 256))
    for eighth in range(8):
        first, second = (
            at.load(weights, arith.addi(byte, at.number((8 * eighth + n) * 256)), at.i32) for n in range(2)
        )
        for half, selector in ((0, "0x5410"), (1, "0x7632")):
            words[eighth, half] = llvm.inline_asm(
                at.i32, [first, second], f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r"
            )
    return at.operand(words)


def _stage_in_order(size: int) -> Any:
    """A function that puts sums [64, size] of `_decoded_across` into shared memory [size, 64], in bfloat16."""

    @_inline(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(_transforms(jnp.bfloat16, 128))))
    def staged(_: Any, sums: Any, rows: Any) -> None:
        at = _Thread()
        base = utils.memref_ptr(rows)
        registers = sums.registers.reshape(size // 8, 2)
        # bytes of a row: 64 for every two warps, eight for every m, of which each warp has half
        chunk = arith.addi(at.times(at.shifted(at.warp, 1), 4), at.shifted(at.row, 1))
        within = arith.addi(
            at.times(arith.andi(at.row, at.number(1)), 8), at.times(arith.andi(at.warp, at.number(1)), 4)
        )
        for n in range(2):
            in_eight = arith.addi(at.times(at.place, 2), at.number(n))
            byte = arith.addi(at.times(in_eight, 128), at.times(arith.xori(chunk, in_eight), 16))
            byte = arith.addi(byte, within)
            for eighth in range(size // 8):
                word = at.rounded(*(at.element(registers[eighth, half], n) for half in range(2)))
                address = utils.getelementptr(base, [arith.addi(byte, at.number(eighth * 8 * 128))], at.i8)
                llvm.store(word, address, alignment=4)

    return staged


def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Codes,
    spans: Spans,
    offset: Any = 0,
    *,
    transposed: bool,
    swiglu: bool = False,
    low: LowRankTerm | None = None,
    tiles: Tiles,
) -> Float[Array, "P out"]:
    """Each span of rows times its group's matrix. Sums are float32 and rounded once.

    Args:
        x: rows sorted by group, bfloat16; their width is a multiple of 128.
        weight: the matrices.
        spans: which rows belong to which group.
        offset: added to the group for the codes.
        transposed: x W^T, else x W, which needs tiles of 128 columns.
        swiglu: the matrix is that of gate and up; the result is silu(gate) * up of the rounded products. Needs
            `transposed` and tiles of 256 columns.
        low: a low-rank term of rank 64 that is also added, as for `hopper.grouped_matmul`; not with `swiglu`.
        tiles: as for `hopper.grouped_matmul`.
    """
    _, out, half = weight.codes.shape
    depth, columns = (half * 2, out) if transposed else (out, half * 2)
    assert x.shape[1] == depth and depth % (2 * DEPTH) == 0, (x.shape, weight.codes.shape)
    assert transposed or tiles.columns == 128, tiles
    assert low is None or (low.rows.shape[1] == RANK and not swiglu)
    depths = (depth,) if low is None else (depth, RANK)
    plan = Plan(transposed, swiglu, columns // 2 if swiglu else columns, depths, 1, tiles)

    def program(refs: tuple[Any, ...], ring: Ring) -> None:
        work, (left, codes, scales, values, *others) = Work(*refs[:5]), refs[5:]
        *added, out, weights, rows, staging, scales_memory, low_memory = others
        pairs = [(left, Codes(codes, scales)), *([tuple(added)] if added else [])]
        memory = out, weights, rows, staging, ring
        warpgroup, share = lax.axis_index("wg"), Share.of(plan, work)
        block = _Program(plan, work, pairs, *memory, share, warpgroup, scales_memory, values, low_memory)
        run_warpgroups(block.produce, block.consume, warpgroup, _REGISTERS)

    # There is one place for the weights of the low-rank term: it is free once the slots of an item have been read.
    slots, width = min(tiles.slots, plan.steps), tiles.columns
    unused = plgpu.SMEM((16,), jnp.float32)
    if transposed:
        codes_memory = plgpu.SMEM((slots, width, DEPTH // 2), jnp.uint8)
        scales_memory = plgpu.SMEM((slots, width), jnp.float32)
        low_memory = shared_memory((width, RANK), x.dtype) if low else unused
    else:
        codes_memory = shared_memory((slots, DEPTH, width // 2), jnp.uint8, 64)
        scales_memory = plgpu.SMEM((slots, width // NF4_BLOCK, DEPTH), jnp.float32)
        low_memory = plgpu.SMEM((RANK, width), x.dtype) if low else unused
    scratch = [
        codes_memory,
        shared_memory((slots, plan.highest, DEPTH), x.dtype),
        shared_memory((CONSUMERS, min(plan.highest, 128), 64), x.dtype),
        scales_memory,
        low_memory,
    ]
    result = jax.ShapeDtypeStruct((x.shape[0], plan.stored_columns), x.dtype)
    copies = 5 if swiglu else 3
    kernel = launch("grouped_matmul_nf4", program, result, scratch, slots=slots, copies=copies, interpret=None)
    as_array = partial(jnp.asarray, dtype=jnp.int32)
    work = [*spans[:3], as_array(spans.used).reshape(1), as_array(offset).reshape(1)]
    values = jnp.asarray(np.tile(NF4_TABLE, _WARPGROUP // 16))
    return kernel(*work, x, weight.codes, weight.scales, values, *(low or ()))[:, : plan.columns]


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
        """Without a low-rank term and SwiGLU: with them it has not been measured."""
        return low is None and not swiglu

    def matmul(
        self,
        x: Array,
        stack: NF4Stack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool,
        low: LowRankTerm | None,
    ) -> Float[Array, "P out"]:
        """As `NF4Products.matmul`."""
        rows, tiles = fitting_tiles(schedule, transposed=transposed, swiglu=swiglu)
        codes = Codes.of(stack, offset, schedule.first_tile.shape[0])
        options: Any = {"transposed": transposed, "swiglu": swiglu, "low": low, "tiles": tiles}
        return grouped_matmul(x, codes, schedule.spans[rows], offset, **options)


@cache
def _small_case() -> str | None:
    """Compares one small product each way with decoded weights: the layouts of registers are private to Mosaic."""
    if jax.default_backend() != "gpu":
        return None
    # In a separate thread, because this is called while another function is being traced in this one.
    with ThreadPoolExecutor(1) as alone:
        equal = alone.submit(small_case_equal).result()
    return None if equal else "found other numbers than those of decoded weights in a small case"


def small_case_equal(*, low_rank: bool = False) -> bool:
    """Whether both products of unit vectors with random codes give the decoded weights, bit by bit; with `low_rank`,
    plus the weights of a low-rank term."""
    keys = jax.random.split(jax.random.key(0), 3)
    side, half = 2 * DEPTH, DEPTH
    codes = jax.random.bits(keys[0], (2, 1, side * half), jnp.uint8)
    absmax = jax.random.uniform(keys[1], (2, 1, side * side // NF4_BLOCK), jnp.float32)
    stack = NF4Stack(codes, absmax, None, None, None, (2, side, side), jnp.dtype(jnp.bfloat16))
    one = jnp.ones(1, jnp.int32)
    spans = Spans(0 * one, one * side // 16, 0 * one, jnp.int32(1))

    @jax.jit
    def compare(stack: NF4Stack) -> Array:
        x, weight = jnp.eye(side, dtype=jnp.bfloat16), stack[jnp.int32(1)]
        added = (jax.random.randint(keys[2], (side, side), -4, 5) / 4).astype(jnp.bfloat16)
        # to the first rows of the result
        added = jnp.where((jnp.arange(side)[:, None] < RANK) & low_rank, added, 0)
        equal = []
        for along, decoded in ((True, weight.T), (False, weight)):
            weights = added[:RANK].T if along else added[:RANK]
            low = LowRankTerm(x[:, :RANK], weights[None]) if low_rank else None
            options: Any = {"transposed": along, "low": low, "tiles": Tiles(128, (side,), 4)}
            found = grouped_matmul(x, Codes.of(stack, 1, 1), spans, 1, **options)
            expected = decoded.astype(jnp.float32) + added.astype(jnp.float32)
            equal.append(jnp.all(found == expected.astype(found.dtype)))
        return jnp.all(jnp.stack(equal))

    return bool(compare(stack))


IN_REGISTERS = InRegisters()
