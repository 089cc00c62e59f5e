"""Grouped matmul for Hopper whose weights are codes: they are decoded in registers, as wgmma's left operand.

    out[rows of a span] = x[rows of the span] @ W[group of the span]^T     (or W)

`hopper_matmul` explains items, spans and the ring; only what differs is here. A step brings 64 of the contracted axis:
rows of x, codes and scales. A consumer decodes an operand [64, 64], 64 columns of the result: the value of a code times
the scale in float32, rounded once, with the bits of the decoded weights. While a product runs, the next operand is
decoded. A form (`Form`) says how codes lie in memory and what they mean.

x W: codes follow each other along the result's columns, and a thread decodes neighbours, the columns of rows m and
m + 8 of its operand. So the operand's rows are not in the order of the result's columns; they are put in order on the
way to shared memory, and the weights of a low-rank term are read in the operand's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import llvm
from jaxtyping import Array, Float

from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.kernels.grouped_matmul.hopper_matmul import Plan, Program, Share, Source, Work
from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import CONSUMERS, Ring, launch, run_warpgroups, shared_memory
from jaxmoe.ops.kernels.grouped_matmul.hopper_thread import (
    OPERAND,
    PER_THREAD,
    WARPGROUP,
    Thread,
    inline,
    reference,
)
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import DEPTH, Tiles
from jaxmoe.ops.schedule import Spans
from jaxmoe.quantized_stack import QuantizedStack

RANK = 64  # of a low-rank term
_language: Any = plgpu  # its types do not say what its decorators return
# Of producer and consumer. With fewer, ptxas waits for each product before it decodes on ("serialized").
_REGISTERS = 24, 240


class Coded(NamedTuple):
    """Codes of all layers' matrices and scales of one layer's; in the kernel references to them, or to the slots of
    shared memory that hold both."""

    codes: Any
    scales: Any


class Piece(NamedTuple):
    """What one copy brings: `codes` or scales from this index of theirs, to this place in the slot."""

    codes: bool
    index: tuple[Any, ...]
    place: tuple[Any, ...] = ()


@runtime_checkable
class Form(Protocol):
    """How matrices [groups, out, inner] are held. From the plan it knows whether x W^T or x W is computed."""

    name: str

    @property
    def table(self) -> np.ndarray | None:
        """A value for each lane of a warp, for `operand`."""
        ...

    def sides(self, coded: Coded) -> tuple[int, int]:
        """(out, inner)."""
        ...

    def memory(self, plan: Plan, slots: int) -> Coded:
        """The shared memory of so many slots."""
        ...

    def pieces(self, plan: Plan, source: Source, group: Array, k: Array) -> Iterator[Piece]:
        """The copies of step k; `group` is `source`'s among those of the scales."""
        ...

    def operand(self, plan: Plan, memory: Coded, slot: Array, column: Array, table: Array | None) -> Array:
        """The weights [64, 64] in a slot, for the 64 columns of the slot that begin at `column`."""
        ...

    def pair(self, at: Thread) -> Any:
        """For x W, which two neighbouring columns of 64 a thread's rows m and m + 8 are: their place in bytes, if each
        has two."""
        ...


@dataclass(frozen=True)
class _Program(Program):
    """One thread block. `weights` are codes; `table` gives each thread the value of its lane; `low` holds the weights
    of the low-rank term."""

    form: Form
    scales: Any
    table: Any
    low: Any

    def load(self, pair: tuple[Any, Any], source: Source, start: Array, k: Array) -> None:
        """Copies step k: DEPTH columns of the rows, and the codes that multiply them with their scales, or the weights
        of the low-rank term."""
        plan, (left, weights) = self.plan, pair
        slot = self.ring.wait_until_free(start + k)
        filled = self.ring.filled.at[slot]
        rows = left.at[pl.ds(source.row, plan.highest), pl.ds(k * DEPTH, DEPTH)]
        plgpu.copy_gmem_to_smem(rows, self.rows.at[slot], filled)
        if not isinstance(weights, Coded):
            self._load_low(weights, source, filled)
            return
        memory = Coded(self.weights, self.scales)
        for piece in self.form.pieces(plan, source, source.group - self.work.offset[0], k):
            refs = [coded.codes if piece.codes else coded.scales for coded in (weights, memory)]
            plgpu.copy_gmem_to_smem(refs[0].at[piece.index], refs[1].at[(slot, *piece.place)], filled)

    def _load_low(self, weights: Any, source: Source, filled: Any) -> None:
        """Copies the weights of the low-rank term, in two halves, so that every step has as many copies."""
        plan = self.plan
        half = (plan.tile_columns if plan.transposed else RANK) // 2
        for first in (0, half):
            if plan.transposed:
                place = pl.ds(source.column + first, half), pl.ds(0, RANK)
            else:
                place = pl.ds(first, half), pl.ds(source.column, plan.tile_columns)
            plgpu.copy_gmem_to_smem(weights.at[(source.group, *place)], self.low.at[pl.ds(first, half)], filled)

    def multiply(self, start: Array, height: int) -> tuple[Array, ...]:
        """The sums of one item, transposed: [64, height] in float32 for each product."""
        plan = self.plan
        # Two operands at least are written in turn, so that one can be decoded while the product of the other runs.
        together = 2 if plan.products == 1 else 1
        table = None if self.table is None else _language.load(self.table, layout=PER_THREAD, optimized=False)
        memory = Coded(self.weights, self.scales)

        def accumulate(*sums: Any) -> tuple[Array, ...]:
            decoded = plan.pair_steps[0]

            @pl.loop(0, decoded // together)
            def _steps(k: Array) -> None:
                for extra in range(together):
                    step = k * together + extra
                    slot = self.ring.wait_until_filled(start + step)
                    rows = self.rows.at[slot, pl.ds(0, height)].transpose((1, 0))
                    for n, acc in enumerate(sums):
                        plgpu.wgmma(acc, self.form.operand(plan, memory, slot, self._column_in_slot(n), table), rows)
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
                    weights = self.low.at[at] if plan.transposed else _loaded_across(self.form)(self.low)
                    plgpu.wgmma(acc, weights, rows)
            return tuple(acc[...] for acc in sums)

        accumulators = [plgpu.WGMMAAccumulatorRef((64, height), jnp.float32) for _ in range(plan.products)]
        sums = pl.run_scoped(accumulate, *accumulators)
        self.ring.arrive(start + plan.steps - 1)
        return sums

    def _column_in_slot(self, n: int) -> Array:
        """Where the 64 columns of product n begin. With SwiGLU a slot holds the columns of gate, then those of up."""
        return self.warpgroup * 64 + n * self.plan.tile_columns if self.plan.swiglu else self.product(n)

    def stage(self, sums: Array, rows: Any) -> None:
        """Puts sums [64, size] into shared memory [size, 64], rounded and with the columns in order."""
        if self.plan.transposed:
            super().stage(sums, rows)
        else:
            _stage_in_order(self.form, sums.shape[1])(sums, rows)


def _loaded_across(form: Form) -> Any:
    """A function that reads weights [64, 128] in bfloat16 as an operand whose rows are in the order of x W."""

    @inline(arg_types=(plgpu.RefType(),), return_type=OPERAND)
    def loaded(_: Any, weights: Any) -> Any:
        at = Thread()
        words = np.empty((8, 2), object)
        byte = at.plus(at.plus(at.times(at.warpgroup, 128), form.pair(at)), at.times(at.place, 2 * 256))
        for eighth in range(8):
            first, second = (at.load(weights, at.plus(byte, (8 * eighth + n) * 256), at.i32) for n in range(2))
            for half, selector in enumerate((0x5410, 0x7632)):
                words[eighth, half] = at.bytes_of(first, second, selector)
        return at.operand(words)

    return loaded


def _stage_in_order(form: Form, size: int) -> Any:
    """A function that puts sums [64, size] of x W into shared memory [size, 64], in bfloat16."""

    @inline(arg_types=(plgpu.Layout.WGMMA, reference(dtype=jnp.bfloat16, swizzle=128)))
    def staged(_: Any, sums: Any, rows: Any) -> None:
        at = Thread()
        base, pair = utils.memref_ptr(rows), form.pair(at)
        registers = sums.registers.reshape(size // 8, 2)
        chunk, within = at.shifted(pair, 4), at.masked(pair, 15)
        for n in range(2):
            in_eight = at.plus(at.times(at.place, 2), n)
            byte = at.plus(at.times(in_eight, 128), at.times(at.xor(chunk, in_eight), 16))
            byte = at.plus(byte, within)
            for eighth in range(size // 8):
                word = at.rounded(*(at.element(registers[eighth, half], n) for half in range(2)))
                address = utils.getelementptr(base, [at.plus(byte, eighth * 8 * 128)], at.i8)
                llvm.store(word, address, alignment=4)

    return staged


def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Coded,
    form: Form,
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
        form: how they are held.
        spans: which rows belong to which group.
        offset: added to the group for the codes.
        transposed: x W^T, else x W, which needs tiles of 128 columns.
        swiglu: the matrix is that of gate and up; the result is silu(gate) * up of the rounded products. Needs
            `transposed` and tiles of 256 columns.
        low: a low-rank term of rank 64 that is also added, as for `hopper.grouped_matmul`; not with `swiglu`.
        tiles: as for `hopper.grouped_matmul`.
    """
    out, inner = form.sides(weight)
    depth, columns = (inner, out) if transposed else (out, inner)
    assert x.shape[1] == depth and depth % (2 * DEPTH) == 0, (x.shape, out, inner)
    assert transposed or tiles.columns == 128, tiles
    assert low is None or (low.rows.shape[1] == RANK and not swiglu)
    depths = (depth,) if low is None else (depth, RANK)
    plan = Plan(transposed, swiglu, columns // 2 if swiglu else columns, depths, 1, tiles)

    def program(refs: tuple[Any, ...], ring: Ring) -> None:
        work, left, coded = Work(*refs[:5]), refs[5], Coded(*refs[6:8])
        *others, out, codes, rows, staging, scales, low_memory = refs[8:]
        table = others.pop(0) if form.table is not None else None
        pairs = [(left, coded), *([tuple(others)] if others else [])]
        warpgroup, share = lax.axis_index("wg"), Share.of(plan, work)
        memory = out, codes, rows, staging
        block = _Program(plan, work, pairs, *memory, ring, share, warpgroup, (), form, scales, table, low_memory)
        run_warpgroups(block.produce, block.consume, warpgroup, _REGISTERS)

    # There is one place for the weights of the low-rank term: it is free once the slots of an item have been read.
    slots, width = min(tiles.slots, plan.steps), tiles.columns
    low_memory = plgpu.SMEM((16,), jnp.float32)  # not used
    if low is not None:
        low_memory = shared_memory((width, RANK), x.dtype) if transposed else plgpu.SMEM((RANK, width), x.dtype)
    memory = form.memory(plan, slots)
    scratch = [
        memory.codes,
        shared_memory((slots, plan.highest, DEPTH), x.dtype),
        shared_memory((CONSUMERS, min(plan.highest, 128), 64), x.dtype),
        memory.scales,
        low_memory,
    ]
    result = jax.ShapeDtypeStruct((x.shape[0], plan.stored_columns), x.dtype)
    name, copies = f"grouped_matmul_{form.name}", 5 if swiglu else 3
    kernel = launch(name, program, result, scratch, slots=slots, copies=copies, interpret=None)
    as_array = partial(jnp.asarray, dtype=jnp.int32)
    work = [*spans[:3], as_array(spans.used).reshape(1), as_array(offset).reshape(1)]
    table = [] if form.table is None else [jnp.asarray(np.tile(form.table, WARPGROUP // form.table.size))]
    return kernel(*work, x, *weight, *table, *(low or ()))[:, : plan.columns]


def why_not(equal: Callable[[], bool]) -> str | None:
    """Why a form should not be used: a small case, which runs on a GPU only, finds other bits.

    Layouts of registers are private to Mosaic. This may be called while a function is being traced, so the case runs in
    a thread of its own.
    """
    if jax.default_backend() != "gpu":
        return None
    with ThreadPoolExecutor(1) as alone:
        found = alone.submit(equal).result()
    return None if found else "found other numbers than those of decoded weights in a small case"


def has_decoded_bits(
    stack: QuantizedStack, coded: Callable[[Any, bool], Coded], form: Form, *, low_rank: bool = False
) -> bool:
    """Whether both products of unit vectors with a square group give the decoded weights, bit by bit.

    Args:
        stack: two groups, of which the second is multiplied.
        coded: from the stack and `transposed`, its codes and the second group's scales.
        form: of the stack.
        low_rank: a low-rank term is added.
    """
    side = stack.shape[1]
    one = jnp.ones(1, jnp.int32)
    spans = Spans(0 * one, one * side // 16, 0 * one, jnp.int32(1))

    @jax.jit
    def compare(stack: Any) -> Array:
        x, weight = jnp.eye(side, dtype=jnp.bfloat16), stack[jnp.int32(1)]
        added = (jax.random.randint(jax.random.key(2), (side, side), -4, 5) / 4).astype(jnp.bfloat16)
        # to the first rows of the result
        added = jnp.where((jnp.arange(side)[:, None] < RANK) & low_rank, added, 0)
        equal = []
        for along, decoded in ((True, weight.T), (False, weight)):
            weights = added[:RANK].T if along else added[:RANK]
            low = LowRankTerm(x[:, :RANK], weights[None]) if low_rank else None
            options: Any = {"transposed": along, "low": low, "tiles": Tiles(128, (side,), 4)}
            found = grouped_matmul(x, coded(stack, along), form, spans, 1, **options)
            expected = decoded.astype(jnp.float32) + added.astype(jnp.float32)
            equal.append(jnp.all(found == expected.astype(found.dtype)))
        return jnp.all(jnp.stack(equal))

    return bool(compare(stack))
