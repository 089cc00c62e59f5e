"""Products of a few rows with matrices that are read once, in place, in 16 bits, FP8 or NF4: what decoding text needs.

A Pallas kernel in Mosaic GPU, for any NVIDIA GPU from compute capability 8.0 on. With so few rows the time is that of
reading the weights. No layer is copied out of its stack, and of the experts only those are read that a row has chosen.
Quantised weights are decoded in registers: the value of a code times the block's scale in float32, rounded once to the
rows' dtype. Sums are float32.

On an H200 text takes 2.5 % longer with it than with the Triton kernel (docs/log), so it is selected by name only.

A thread block computes some columns of the result. Threads read 8 neighbours of a column's weights each (`row_tiles`),
multiply them by those of one row (`Rows.separate`) or of some rows of the group, and a warp adds up at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxmoe.fp8.codec import E4M3
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.nf4.codec import NF4_TABLE
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops import small_case
from jaxmoe.ops.few_rows import GATHERED, Rows, matrices_of, most_rows_of_kernels, unsupported_by_kernels
from jaxmoe.ops.kernels import ampere, row_tiles
from jaxmoe.ops.kernels.row_tiles import across, load, rows_of
from jaxmoe.parameters import FP8_BLOCK, NF4_BLOCK, NF4_NESTED_BLOCK
from jaxmoe.quantized_stack import QuantizedStack

_HELD = 16_384  # weights that a thread block reads before it multiplies: 64 registers of a thread in 16 bits


class Blocks(NamedTuple):
    """How the work is cut: columns of the result in a tile (with SwiGLU, of gate and of up), tiles of a thread block
    one after the other, rows multiplied together, depth of a step."""

    columns: int
    turns: int
    rows: int
    depth: int


def unsupported(dtype: Any, *stacks: Any) -> str | None:
    """Why the kernel cannot multiply rows of this dtype with these stacks; None if it can."""
    if (why := ampere.unsupported(dtype)) is not None:
        return why
    for stack in stacks:
        if (why := unsupported_by_kernels(dtype, stack)) is not None:
            return why
    return None


def products(
    x: Float[Array, "X inner"],
    stacks: Sequence[Float[Array, "groups _ inner"] | QuantizedStack],
    rows: Rows,
    dtype: Any,
    *,
    swiglu: bool = False,
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> list[Float[Array, "R _"]]:
    """Each row of `rows` times its group's matrix of each stack, transposed, by one launch; sums are float32.

    Args:
        x: where the rows are.
        stacks: matrices [out, inner] each.
        rows: which rows of x are multiplied with which matrices, and where the results go.
        dtype: of the results, which are rounded once.
        swiglu: the product is that of gate and up. It is rounded to x's dtype, and SwiGLU of it is returned.
        blocks: how the work is cut; other than the default has not been timed.
        interpret: parameters of JAX's interpreter.
    """
    halves, inner = 2 if swiglu else 1, x.shape[1]
    blocks = blocks or _default_blocks(inner, rows, halves, max(stack.shape[1] for stack in stacks))
    weights = [_Weights(stack, halves, interpret is not None) for stack in stacks]
    blocks = blocks._replace(columns=math.gcd(blocks.columns, *(each.in_matrix for each in weights)))
    turns = [math.gcd(blocks.turns, each.columns // blocks.columns) for each in weights]
    programs = [each.columns // blocks.columns // own for each, own in zip(weights, turns, strict=True)]
    numbers = [rows.offset.reshape(1), *(each for each in (rows.group, rows.order) if each is not None)]
    table = [jnp.asarray(np.tile(NF4_TABLE, ampere.THREADS // NF4_TABLE.size))]
    arrays = [each.arrays for each in weights]
    operands = [array for own in arrays for array in own]

    def body(*refs: Any) -> None:
        listed = _Listed(rows, refs[: len(numbers)])
        (table_ref, x_ref), refs = refs[len(numbers) : len(numbers) + 2], refs[len(numbers) + 2 :]
        outs, refs, first = refs[len(operands) :], refs[: len(operands)], 0
        number, program = lax.axis_index("row"), lax.axis_index("column")
        for each, count, out, own, mine in zip(weights, map(len, arrays), outs, programs, turns, strict=True):
            matrix, refs = each.opened(refs[:count], table_ref), refs[count:]
            work = partial(_run, _Tile(matrix, x_ref, blocks), listed, out, number, program - first, mine)
            work() if len(weights) == 1 else pl.when((program >= first) & (program < first + own))(work)
            first += own

    results = [jax.ShapeDtypeStruct((rows.count, each.columns), dtype) for each in weights]
    grid = {"column": sum(programs), "row": rows.count}
    return list(ampere.launch("few_rows", body, results, [], grid, interpret)(*numbers, *table, x, *operands))


def _default_blocks(inner: int, rows: Rows, halves: int, out: int) -> Blocks:
    """What fills the registers with weights on their way; it has not been timed. The depth divides `inner`."""
    width = _width(inner)
    steps = inner // width
    if rows.separate:
        columns = 4 if halves == 2 or out <= 1024 else 8
        together = 1
    else:
        columns, together = 4 if halves == 2 else 8, 4
    columns = max(columns, rows_of(width))
    wanted = max(1, _HELD // (halves * columns * width) // (2 if together > 1 else 1))
    return Blocks(columns, 1, together, width * max(each for each in range(1, wanted + 1) if steps % each == 0))


def _width(inner: int) -> int:
    """The columns of a tile in registers."""
    return math.gcd(inner, row_tiles.WIDEST)


class _Listed(NamedTuple):
    """The products inside the kernel, by their numbers."""

    rows: Rows
    refs: Sequence[Any]

    def group(self, number: Array) -> Array:
        """The group that product `number` multiplies by."""
        return self.refs[0][0] if self.rows.group is None else self.refs[0][0] + self.refs[1][number]

    def source(self, number: Array) -> Array:
        """Its row of x."""
        target = self.target(number)
        return target if self.rows.per_source == 1 else lax.div(target, jnp.int32(self.rows.per_source))

    def target(self, number: Array) -> Array:
        """Its row of the result."""
        return number if self.rows.order is None else self.refs[-1][number]


class _Weights(NamedTuple):
    """One stack; with two `halves`, gate and up, a column of the result needs one of each."""

    stack: Any
    halves: int
    plain: bool  # decode by plain operations

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.stack.shape[1] // self.halves

    @property
    def in_matrix(self) -> int:
        """Columns of one matrix, so that a tile's columns lie in one."""
        return math.gcd(self.columns, self.stack.shape[1] // matrices_of(self.stack))

    @property
    def arrays(self) -> list[Array]:
        """What the kernel reads: the weights, or codes and scales, by the rows of their matrices."""
        stack = self.stack
        groups, out, _ = stack.shape
        if isinstance(stack, FP8Stack):
            return [stack.codes, stack.scales]
        if not isinstance(stack, NF4Stack):
            return [stack]
        by_column = [each.reshape(groups, out, -1) for each in (stack.codes, stack.absmax)]
        if stack.nested_absmax is None:
            return by_column
        return [*by_column, stack.nested_absmax, stack.nested_offset, stack.nested_quant_map]

    def opened(self, refs: Sequence[Any], table: Any) -> _Matrix:
        """The stack inside the kernel."""
        if isinstance(self.stack, FP8Stack):
            return _InFP8(self, refs)
        return _InNF4(self, refs, table) if isinstance(self.stack, NF4Stack) else _Matrix(self, refs)


@dataclass(frozen=True)
class _Matrix:
    """References to a stack in 16 bits."""

    weights: _Weights
    refs: Sequence[Any]

    def read(self, group: Array, column: Array, count: int, start: Array, width: int) -> Any:
        """What is read of so many columns from `column` on, and of so many weights of each from `start` on."""
        return load(self.refs[0].at[group, pl.ds(column, count), pl.ds(start, width)], width)

    def decoded(self, loaded: Any, shape: tuple[int, int], dtype: Any) -> Array:
        """The weights of what was read, in the rows' dtype."""
        return loaded

    def matrix(self, column: Array) -> tuple[Array, Array]:
        """Which of the group's matrices a column lies in, and its place there."""
        size = self.weights.stack.shape[1] // matrices_of(self.weights.stack)
        number = lax.div(column, jnp.int32(size))
        return number, column - number * size


@dataclass(frozen=True)
class _InNF4(_Matrix):
    """References to a stack in NF4, and to the table: a value for each thread."""

    table: Any

    def read(self, group: Array, column: Array, count: int, start: Array, width: int) -> Any:
        codes, absmax, *nested = self.refs
        columns, blocks = pl.ds(column, count), width // NF4_BLOCK
        half = pl.multiple_of(lax.div(start, jnp.int32(2)), width // 2)
        loaded = load_bytes(codes.at[group, columns, pl.ds(half, width // 2)], width // 2)
        first = lax.div(start, jnp.int32(NF4_BLOCK))
        scales = absmax.at[group, columns, pl.ds(first, blocks)]
        if not nested:
            return loaded, scales, ()
        matrix, row = self.matrix(column)
        in_row = self.weights.stack.shape[2] // NF4_BLOCK
        outer, offset, values = nested
        return loaded, scales, (outer.at[group, matrix], offset[group, matrix], values, row * in_row + first, in_row)

    def decoded(self, loaded: Any, shape: tuple[int, int], dtype: Any) -> Array:
        codes, scales, nested = loaded
        return (_nf4_plainly if self.weights.plain else _nf4)(codes, scales, nested, self.table, shape, dtype)


@dataclass(frozen=True)
class _InFP8(_Matrix):
    """References to a stack in FP8."""

    def read(self, group: Array, column: Array, count: int, start: Array, width: int) -> Any:
        codes, scales = self.refs
        matrix, row = self.matrix(column)
        block, first = lax.div(row, jnp.int32(FP8_BLOCK)), lax.div(start, jnp.int32(FP8_BLOCK))
        loaded = load(codes.at[group, pl.ds(column, count), pl.ds(start, width)], width)
        return loaded, scales.at[group, matrix, block, pl.ds(first, width // FP8_BLOCK)]

    def decoded(self, loaded: Any, shape: tuple[int, int], dtype: Any) -> Array:
        codes, scales = loaded
        return (_fp8_plainly if self.weights.plain else _fp8)(codes, scales, shape, dtype)


@dataclass(frozen=True)
class _Tile:
    """One stack and the rows inside the kernel."""

    matrix: _Matrix
    x: Any
    blocks: Blocks

    def sums(self, group: Array, column: Array, sources: Sequence[Array]) -> list[list[Array]]:
        """For each row and each half of the matrix, the columns' sums."""
        weights, (count, _, _, depth) = self.matrix.weights, self.blocks
        inner = self.x.shape[1]
        width = _width(inner)
        columns = [column + half * weights.columns for half in range(weights.halves)]

        def step(number: Any, accs: Any) -> Any:
            starts = [number * depth + n * width for n in range(depth // width)]
            # All weights of a step are on their way before the first is used.
            read = [[self.matrix.read(group, first, count, start, width) for first in columns] for start in starts]
            for start, loaded in zip(starts, read, strict=True):
                rows = [
                    load(self.x.at[source, pl.ds(start, width)], width, 1).astype(jnp.float32) for source in sources
                ]
                tiles = [self.matrix.decoded(each, (count, width), self.x.dtype).astype(jnp.float32) for each in loaded]
                added = [[tile * across(row, (count, width), 1) for tile in tiles] for row in rows]
                accs = added if accs is None else jax.tree.map(jnp.add, accs, added)
            return accs

        if depth == inner:
            accs = step(jnp.int32(0), None)
        else:
            zero = row_tiles.plgpu.layout_cast(jnp.zeros((count, width), jnp.float32), row_tiles.layout(width))
            accs = [[zero] * len(columns) for _ in sources]
            accs = lax.fori_loop(0, inner // depth, step, accs)
        return [[jnp.sum(acc, axis=1) for acc in own] for own in accs]


def _run(tile: _Tile, listed: _Listed, out: Any, number: Array, program: Array, turns: int) -> None:
    """Multiplies one row, or all rows of its group if it is the first of them."""
    blocks, dtype = tile.blocks, tile.x.dtype

    def store(halves: Sequence[Array], position: Array, column: Array) -> None:
        place = out.at[listed.target(position), pl.ds(column, blocks.columns)]
        ampere.store(_finish(halves, dtype).astype(out.dtype), place)

    def turn(at: Array) -> None:
        column = (program * turns + at) * blocks.columns
        group = listed.group(number)
        if listed.rows.separate:
            (sums,) = tile.sums(group, column, [listed.source(number)])
            store(sums, number, column)
        else:
            _rows_of_group(tile, listed, number, partial(store, column=column), column)

    def all_turns() -> None:
        if turns == 1:
            turn(jnp.int32(0))
        else:
            lax.fori_loop(0, turns, lambda at, _: turn(at), None)

    if listed.rows.separate:
        all_turns()
    else:
        before = listed.group(jnp.maximum(number - 1, 0))
        pl.when((number == 0) | (before != listed.group(number)))(all_turns)


def _rows_of_group(tile: _Tile, listed: _Listed, number: Array, store: Any, column: Array) -> None:
    count, together, group = listed.rows.count, tile.blocks.rows, listed.group(number)

    def of_group(position: Array) -> Array:
        return (position < count) & (listed.group(jnp.minimum(position, count - 1)) == group)

    def some(state: tuple[Array, Array]) -> tuple[Array, Array]:
        position, _ = state
        positions = [position + n for n in range(together)]
        sources = [listed.source(jnp.minimum(each, count - 1)) for each in positions]
        found = tile.sums(group, column, sources)
        for each, halves in zip(positions, found, strict=True):
            pl.when(of_group(each))(partial(store, halves, each))
        following = position + together
        return following, of_group(following)

    lax.while_loop(lambda state: state[1], some, (number, jnp.bool_(True)))


def _finish(halves: Sequence[Array], dtype: Any) -> Array:
    """The sums, or SwiGLU of gate and up, each rounded to `dtype` as the product of both would be."""
    if len(halves) == 1:
        return halves[0]
    gate, up = (half.astype(dtype).astype(jnp.float32) for half in halves)
    return gate / (1 + jnp.exp(-gate)) * up


def load_bytes(ref: Any, columns: int) -> Array:
    """A tile of bytes, of which a thread holds half as many in a row."""
    return row_tiles.plgpu.load(ref, layout=row_tiles.layout(columns, row_tiles.VECTOR // 2), optimized=False)


def _nf4_plainly(codes: Array, scales: Any, nested: Any, table: Any, shape: tuple[int, int], dtype: Any) -> Array:
    """The weights of codes in NF4, for the interpreter."""
    absmax = scales[...]
    if nested:
        outer, offset, values, first, in_row = nested
        place = first + in_row * jnp.arange(shape[0])[:, None] + jnp.arange(absmax.shape[1])[None, :]
        product = values[...][absmax.astype(jnp.int32)] * outer[...][place // NF4_NESTED_BLOCK]
        absmax = jnp.minimum(product, jnp.finfo(jnp.float32).max) + offset
    codes = codes.astype(jnp.int32)
    pairs = table[...][jnp.stack([codes >> 4, codes & 15], axis=-1)].reshape(shape)
    return (pairs * jnp.repeat(absmax, NF4_BLOCK, axis=1)).astype(dtype)


def _fp8_plainly(codes: Array, scales: Any, shape: tuple[int, int], dtype: Any) -> Array:
    """The weights of codes in FP8, for the interpreter."""
    return (codes.astype(jnp.float32) * jnp.repeat(scales[...].astype(jnp.float32), FP8_BLOCK)[None]).astype(dtype)


def _nf4(codes: Array, scales: Any, nested: Any, table: Any, shape: tuple[int, int], dtype: Any) -> Array:
    """The weights of codes in NF4: each lane of a warp holds a value of the table, and a shuffle looks it up."""
    from jaxmoe.ops.kernels import few_rows_decoding

    return few_rows_decoding.nf4(codes, scales, nested, table, shape, dtype)


def _fp8(codes: Array, scales: Any, shape: tuple[int, int], dtype: Any) -> Array:
    """The weights of codes in FP8, two by one instruction."""
    from jaxmoe.ops.kernels import few_rows_decoding

    return few_rows_decoding.fp8(codes, scales, shape, dtype)


class Kernel:
    """The implementation "mosaic" of products of few rows."""

    shares_launch = True

    def most_rows(self, *stacks: Any) -> int:
        """As `most_rows_of_kernels`."""
        return most_rows_of_kernels(stacks)

    def unsupported(self, dtype: Any, *stacks: Any) -> str | None:
        """Why it cannot multiply rows of this dtype with these stacks, or None; on a GPU it first runs small cases."""
        if (why := unsupported(dtype, *stacks)) is not None or jax.default_backend() != "gpu":
            return why
        forms = sorted({type(stack).__name__ for stack in stacks if isinstance(stack, QuantizedStack)} | {"16 bit"})
        cases = (_small_case(form, jnp.dtype(dtype).name) for form in forms)
        return next((why for why in cases if why is not None), None)

    def products(
        self, x: Array, stacks: Sequence[Array | QuantizedStack], rows: Rows, dtype: Any, *, swiglu: bool = False
    ) -> list[Array]:
        """As `FewRows.products`."""
        return products(x, stacks, rows, dtype, swiglu=swiglu)


@cache
def _small_case(form: str, dtype: str) -> str | None:
    return small_case.why_not(partial(small_case_error, form, dtype), f"a small product of few rows, {form}")


def small_case_error(form: str, dtype: str, interpret: Any = None) -> float:
    """The relative error of products with a stack of this form: "16 bit" or the name of its class."""
    keys, wanted = jax.random.split(jax.random.key(0), 6), jnp.dtype(dtype)
    groups, out, inner = shape = 3, 128, 256
    bits = lambda key, *size: jax.random.bits(key, size, jnp.uint8)
    uniform = lambda key, *size: jax.random.uniform(key, size, jnp.float32, 0.5, 1.5)
    stack: Any = jax.random.normal(keys[0], shape).astype(wanted)
    if form == "NF4Stack":
        codes, blocks = bits(keys[0], groups, 1, out * inner // 2), out * inner // NF4_BLOCK
        nested = uniform(keys[2], groups, 1, blocks // NF4_NESTED_BLOCK), uniform(keys[3], groups, 1)
        table = jnp.linspace(-1, 1, 256, dtype=jnp.float32)
        stack = NF4Stack(codes, bits(keys[1], groups, 1, blocks), *nested, table, shape, wanted)
    elif form == "FP8Stack":
        codes = jnp.clip(60 * jax.random.normal(keys[0], shape), -448, 448).astype(E4M3)
        scales = uniform(keys[1], groups, 1, out // FP8_BLOCK, inner // FP8_BLOCK)
        stack = FP8Stack(codes, scales, shape, wanted)

    @jax.jit
    def error(x: Array, stack: Any, experts: Array) -> Array:
        rows = Rows.of_experts(experts, 1)
        (found,) = products(x, [stack], rows, jnp.float32, swiglu=True, interpret=interpret)
        (exact,) = GATHERED.products(x, [stack], rows, jnp.float32, swiglu=True)
        return small_case.relative_error(found, exact)

    x = jax.random.normal(keys[4], (3, inner)).astype(wanted)
    return float(error(x, stack, jnp.asarray([[0, 1], [1, 0], [1, 0]], jnp.int32)))


KERNEL = Kernel()
