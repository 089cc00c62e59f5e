"""Products of a few rows with matrices that are read once, in place, in 16 bits or in NF4: what decoding text needs.

A Pallas kernel in Triton, for any NVIDIA GPU. With so few rows the time is that of reading the weights. No layer is
copied out of its stack, and of the experts only those are read that a row has chosen. NF4 is decoded in registers:
table value times absmax in float32, rounded once to the rows' dtype, as bitsandbytes does. Sums are float32.

Each program computes some columns of the result, of one row (`_each_row`) or of all rows of a group (`_rows_of_group`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxmoe.nf4.codec import NF4_TABLE
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.few_rows import Rows
from jaxmoe.parameters import NF4_BLOCK, NF4_NESTED_BLOCK

_TOGETHER = 16  # rows that one product on the tensor cores takes
_HALF = NF4_BLOCK // 2  # bytes of a block; each holds an even element in its high half and the next in its low half
_COLUMNS = 32  # of a matrix; so a program's columns, at most as many in NF4, lie in one matrix
_UNSAFE = range(2**31, 2**32 + 1)  # bytes of codes that Triton's 32-bit offsets, which are signed, do not reach


class Blocks(NamedTuple):
    """How the work is cut: columns of the result in a program, depth of a step, warps, steps loaded ahead."""

    columns: int
    depth: int
    warps: int
    stages: int


def unsupported(dtype: Any, *stacks: Any) -> str | None:
    """Why the kernel cannot multiply rows of this dtype with these stacks; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, found {jnp.dtype(dtype).name}"
    for stack in stacks:
        if stack.dtype != dtype:
            return f"needs weights in {jnp.dtype(dtype).name}, found {jnp.dtype(stack.dtype).name}"
        *_, out, inner = stack.shape
        matrices = stack.codes.shape[-2] if isinstance(stack, NF4Stack) else 1
        if out // matrices % _COLUMNS or inner % 128:
            return f"needs matrices of a multiple of 32 by a multiple of 128, found {out // matrices} by {inner}"
        if isinstance(stack, NF4Stack) and stack.places is not None:
            return "needs stacks whose layers are all in NF4"
        if isinstance(stack, NF4Stack) and stack.codes.size in _UNSAFE:
            return "needs codes of less than 2 GiB or more than 4 GiB"
    return None


def products(
    x: Float[Array, "X inner"],
    stacks: Sequence[Float[Array, "groups _ inner"] | NF4Stack],
    rows: Rows,
    dtype: Any,
    *,
    swiglu: bool = False,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> list[Float[Array, "R _"]]:
    """Each row of `rows` times its group's matrix of each stack, transposed, by one launch; sums are float32.

    Args:
        x: where the rows are.
        stacks: matrices [out, inner] each.
        rows: which rows of x are multiplied with which matrices, and where the results go.
        dtype: of the results, which are rounded once.
        swiglu: the product is that of gate and up. It is rounded to x's dtype, and SwiGLU of it is returned.
        blocks: how the work is cut; by default what was fastest on an H200.
        interpret: run in Pallas' interpreter, without a GPU.
    """
    nf4 = isinstance(stacks[0], NF4Stack)
    if any(isinstance(stack, NF4Stack) != nf4 for stack in stacks):  # one launch for each
        alone = partial(products, swiglu=swiglu, blocks=blocks, interpret=interpret)
        return [alone(x, [stack], rows, dtype)[0] for stack in stacks]
    weights = [_Weights(stack, 2 if swiglu else 1) for stack in stacks]
    blocks = blocks or _default_blocks(x.shape[1], rows, nf4)
    parted = nf4 and not rows.separate
    if parted:
        x = jnp.concatenate([x[:, ::2], x[:, 1::2]], axis=1)
    programs = [each.columns // math.gcd(blocks.columns, each.columns) for each in weights]
    count = len(rows.group)
    operands = [array for each in weights for array in each.arrays]

    def body(*refs: Any) -> None:
        listed = rows._replace(group=refs[0], source=refs[1], target=refs[2])
        (table, x_ref), refs = refs[3:5], refs[5:]
        outs, refs, first = refs[len(operands) :], refs[: len(operands)], 0
        program = _each_row if rows.separate else _rows_of_group
        place = pl.program_id(0), count
        for each, out, own in zip(weights, outs, programs, strict=True):
            tile = _Tile(each, refs[: len(each.arrays)], table, x_ref, blocks.depth, parted)
            refs = refs[len(each.arrays) :]
            columns = each.columns // own
            mine = pl.program_id(1) - first
            work = partial(program, tile, listed, place, out, mine * columns, columns)
            work() if len(weights) == 1 else pl.when((mine >= 0) & (mine < own))(work)
            first += own

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kernel = pl.pallas_call(
        body,
        grid=(count, sum(programs)),
        out_shape=[jax.ShapeDtypeStruct((count, each.columns), dtype) for each in weights],
        in_specs=[anywhere] * (5 + len(operands)),
        out_specs=[anywhere] * len(weights),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="few_rows",
    )
    return list(kernel(rows.group, rows.source, rows.target, jnp.asarray(NF4_TABLE), x, *operands))


def _default_blocks(inner: int, rows: Rows, nf4: bool) -> Blocks:
    if rows.separate:
        return Blocks(4, 1024, 4, 3) if inner % 1024 == 0 else Blocks(4, math.gcd(inner, 512), 1, 3)
    # With stages, Triton would copy NF4's table to shared memory element by element, which takes four times as long.
    if rows.most_groups > 1:
        return Blocks(32, 128, 4, 1) if nf4 else Blocks(64, 128, 4, 3)
    # A single group has few columns in all: they are divided among more programs.
    return Blocks(16, math.gcd(inner, 256), 4, 1) if nf4 else Blocks(32, 128, 4, 4)


class _Weights(NamedTuple):
    """One stack; with two `halves`, gate and up, a column of the result needs one of each."""

    stack: Any
    halves: int

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.stack.shape[1] // self.halves

    @property
    def arrays(self) -> list[Array]:
        """What the kernel reads: the weights, or codes and scales in the order of `NF4Stack`."""
        stack = self.stack
        if not isinstance(stack, NF4Stack):
            return [stack]
        if stack.nested_absmax is None:
            return [stack.codes, stack.absmax]
        return [stack.codes, stack.absmax, stack.nested_absmax, stack.nested_offset, stack.nested_quant_map]


@dataclass(frozen=True)
class _Tile:
    """References of one stack inside the kernel, of NF4's table and of the rows, and the depth of a step."""

    weights: _Weights
    refs: Sequence[Any]
    table: Any
    x: Any
    depth: int
    parted: bool  # the rows hold their even elements, then the odd ones

    @property
    def steps(self) -> int:
        """Steps along the contraction."""
        return self.x.shape[1] // self.depth

    def pairs(self, group: Array, column: Array, count: int, step: Array) -> list[tuple[Array, Array]]:
        """(weights [count, *n], their places [*n] in a row), together the `depth` elements of this step."""
        start = step * self.depth
        columns = column + jnp.arange(count)
        if not isinstance(self.weights.stack, NF4Stack):
            places = start + jnp.arange(self.depth)
            return [(self.refs[0][group, columns[:, None], places[None, :]], places)]
        return self._decoded(group, column, count, start)

    def _decoded(self, group: Array, column: Array, count: int, start: Array) -> list[tuple[Array, Array]]:
        """The even elements, then the odd ones, [count, blocks, 32] each."""
        stack = self.weights.stack
        _, out, inner = stack.shape
        matrix, row = jnp.int32(0), column + jnp.arange(count)
        if (matrices := stack.codes.shape[-2]) > 1:  # all columns of a program lie in one matrix
            matrix = jax.lax.div(column, jnp.int32(out // matrices))
            row -= matrix * (out // matrices)
        block = (
            (row * (inner // NF4_BLOCK))[:, None] + start // NF4_BLOCK + jnp.arange(self.depth // NF4_BLOCK)[None, :]
        )
        absmax = self._absmax(group, matrix, block)[:, :, None]
        codes = self.refs[0][group, matrix, block[:, :, None] * _HALF + jnp.arange(_HALF)[None, None, :]]
        codes = codes.astype(jnp.int32)
        block = jnp.arange(self.depth // NF4_BLOCK)[:, None]
        if self.parted:
            places = start // 2 + block * _HALF + jnp.arange(_HALF)[None, :]
            further = inner // 2
        else:
            places = start + block * NF4_BLOCK + 2 * jnp.arange(_HALF)[None, :]
            further = 1
        halves = (codes >> 4, places), (codes & 15, places + further)
        return [((self.table[code] * absmax).astype(self.x.dtype), places) for code, places in halves]

    def _absmax(self, group: Array, matrix: Array, block: Array) -> Array:
        absmax = self.refs[1][group, matrix, block]
        if len(self.refs) == 2:
            return absmax
        _, _, nested_absmax, offset, table = self.refs
        nested = nested_absmax[group, matrix, block // NF4_NESTED_BLOCK]
        # As in `jaxmoe.nf4.stack`: the bound changes no finite number, it keeps product and sum apart.
        product = jnp.minimum(table[absmax.astype(jnp.int32)] * nested, jnp.finfo(jnp.float32).max)
        return product + offset[group, matrix]


def _each_row(tile: _Tile, rows: Rows, place: tuple[Array, int], out: Any, column: Array, columns: int) -> None:
    """Multiplies the program's own row element by element; a program's threads add up their sums once, at the end."""
    number, _ = place
    group, source = rows.group[number], rows.source[number]

    def half(first: Array) -> Array:
        def step(number: Array, acc: Array) -> Array:
            for weights, places in tile.pairs(group, first, columns, number):
                acc += weights.astype(jnp.float32) * tile.x[source, places].astype(jnp.float32)[None]
            return acc

        shape = jax.eval_shape(lambda: tile.pairs(group, first, columns, jnp.int32(0))[0][0]).shape
        acc = jax.lax.fori_loop(0, tile.steps, step, jnp.zeros(shape, jnp.float32))
        while acc.ndim > 1:
            acc = jnp.sum(acc, axis=-1)
        return acc

    result = _finish([half(column + n * tile.weights.columns) for n in range(tile.weights.halves)], tile.x.dtype)
    out[rows.target[number], column + jnp.arange(columns)] = result.astype(out.dtype)


def _rows_of_group(tile: _Tile, rows: Rows, place: tuple[Array, int], out: Any, column: Array, columns: int) -> None:
    """Multiplies all rows of a group on the tensor cores, if the program's row is the first of them."""
    number, count = place
    group = rows.group[number]

    def of_group(position: Array) -> Array:
        return (position < count) & (rows.group[jnp.minimum(position, count - 1)] == group)

    def some(position: Array) -> Array:
        positions = position + jnp.arange(_TOGETHER)
        inside = jnp.minimum(positions, count - 1)
        source = rows.source[inside]

        def half(first: Array) -> Array:
            def step(number: Array, acc: Array) -> Array:
                for weights, places in tile.pairs(group, first, columns, number):
                    x = tile.x[source[None, :], places.reshape(-1)[:, None]]
                    acc += jnp.dot(weights.reshape(columns, -1), x, preferred_element_type=jnp.float32)
                return acc

            return jax.lax.fori_loop(0, tile.steps, step, jnp.zeros((columns, _TOGETHER), jnp.float32))

        result = _finish([half(column + n * tile.weights.columns) for n in range(tile.weights.halves)], tile.x.dtype)
        own = (positions < count) & (rows.group[inside] == group)
        # Places of nothing are different from each other: the interpreter writes what is masked back.
        target = jnp.where(positions < count, rows.target[inside], positions)
        where = out.at[target[None, :], (column + jnp.arange(columns))[:, None]]
        triton.store(where, result.astype(out.dtype), mask=own[None, :])
        return position + _TOGETHER

    @pl.when((number == 0) | (rows.group[jnp.maximum(number - 1, 0)] != group))
    def _() -> None:
        jax.lax.while_loop(of_group, some, number)


def _finish(halves: Sequence[Array], dtype: Any) -> Array:
    """The sums, or SwiGLU of gate and up, each rounded to `dtype` as the product of both would be."""
    if len(halves) == 1:
        return halves[0]
    gate, up = (half.astype(dtype).astype(jnp.float32) for half in halves)
    return gate / (1 + jnp.exp(-gate)) * up


class Kernel:
    """The implementation "triton" of products of few rows."""

    most_rows = 32
    shares_launch = True

    def unsupported(self, dtype: Any, *stacks: Any) -> str | None:
        """Why it cannot multiply rows of this dtype with these stacks, or None."""
        return unsupported(dtype, *stacks)

    def products(
        self, x: Array, stacks: Sequence[Array | NF4Stack], rows: Rows, dtype: Any, *, swiglu: bool = False
    ) -> list[Array]:
        """As `FewRows.products`."""
        return products(x, stacks, rows, dtype, swiglu=swiglu)


KERNEL = Kernel()
