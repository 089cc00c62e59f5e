"""Products of a few rows with matrices that are read once, in place, in 16 bits, FP8 or NF4: what decoding text needs.

A Pallas kernel in Triton, for any NVIDIA GPU. With so few rows the time is that of reading the weights. No layer is
copied out of its stack, and of the experts only those are read that a row has chosen. NF4 is decoded in registers:
table value times absmax in float32, rounded once to the rows' dtype, as bitsandbytes does; FP8 likewise, code times
scale. Sums are float32.

Each program computes some columns of the result, of one row (`_each_row`) or of all rows of a group (`_rows_of_group`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.nf4.codec import NF4_TABLE
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.few_rows import Rows, matrices_of, most_rows_of_kernels, unsupported_by_kernels
from jaxmoe.parameters import FP8_BLOCK, NF4_BLOCK, NF4_NESTED_BLOCK
from jaxmoe.quantized_stack import QuantizedStack

_TOGETHER = 16  # rows that one product on the tensor cores takes
_HALF = NF4_BLOCK // 2  # bytes of a block; each holds an even element in its high half and the next in its low half
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
        if (why := unsupported_by_kernels(dtype, stack)) is not None:
            return why
        if isinstance(stack, NF4Stack | FP8Stack) and stack.codes.size in _UNSAFE:
            return "needs codes of less than 2 GiB or more than 4 GiB"
    return None


def products(
    x: Float[Array, "X inner"],
    stacks: Sequence[Float[Array, "groups _ inner"] | QuantizedStack],
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
    decode = _looked_up if interpret else _decoded_pairs
    programs = [each.columns // math.gcd(blocks.columns, each.columns, each.in_matrix) for each in weights]
    numbers = [rows.offset.reshape(1), *(each for each in (rows.group, rows.order) if each is not None)]
    operands = [array for each in weights for array in each.arrays]

    def body(*refs: Any) -> None:
        listed = _Listed(rows, refs[: len(numbers)], pl.program_id(0))
        (table, x_ref), refs = refs[len(numbers) : len(numbers) + 2], refs[len(numbers) + 2 :]
        outs, refs, first = refs[len(operands) :], refs[: len(operands)], 0
        program = _each_row if rows.separate else _rows_of_group
        for each, out, own in zip(weights, outs, programs, strict=True):
            tile = _Tile(each, refs[: len(each.arrays)], table, x_ref, blocks.depth, decode, nf4 or rows.separate)
            refs = refs[len(each.arrays) :]
            columns = each.columns // own
            mine = pl.program_id(1) - first
            work = partial(program, tile, listed, out, mine * columns, columns)
            work() if len(weights) == 1 else pl.when((mine >= 0) & (mine < own))(work)
            first += own

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kernel = pl.pallas_call(
        body,
        grid=(rows.count, sum(programs)),
        out_shape=[jax.ShapeDtypeStruct((rows.count, each.columns), dtype) for each in weights],
        in_specs=[anywhere] * (len(numbers) + 2 + len(operands)),
        out_specs=[anywhere] * len(weights),
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="few_rows",
    )
    return list(kernel(*numbers, jnp.asarray(NF4_TABLE), x, *operands))


def _default_blocks(inner: int, rows: Rows, nf4: bool) -> Blocks:
    """What was fastest on an H200 for Qwen3-30B-A3B's widths, cut to a divisor of `inner`."""
    one_group = rows.group is None
    if rows.separate:
        # Without the tensor cores a step needs no barrier: few steps with many loads in flight.
        if inner % 512:
            return Blocks(4, math.gcd(inner, 512), 1, 3)
        if nf4:
            return Blocks(4, math.gcd(inner, 1024), 4, 3) if one_group else Blocks(8, 512, 4, 3)
        return Blocks(4 if one_group else 2, depth := math.gcd(inner, 2048), depth // 256, 3)
    # Triton's stages copy 16-bit weights ahead; what NF4 needs ahead is held in registers.
    if not one_group:
        return Blocks(64, 128, 4, 1 if nf4 else 3)
    # A single group has few columns in all: they are divided among more programs.
    if inner > 2048:
        return Blocks(16, math.gcd(inner, 512), 4, 1 if nf4 else 4)
    return Blocks(16, math.gcd(inner, 256), 4, 1) if nf4 else Blocks(32, 128, 4, 4)


class _Listed(NamedTuple):
    """The products inside the kernel, by their numbers; `own` is the number of the program's."""

    rows: Rows
    refs: Sequence[Any]
    own: Array

    def group(self, number: Array) -> Array:
        """The group that product `number` multiplies by."""
        return self.refs[0][0] if self.rows.group is None else self.refs[0][0] + self.refs[1][number]

    def source(self, number: Array) -> Array:
        """Its row of x."""
        target = self.target(number)
        return target if self.rows.per_source == 1 else jax.lax.div(target, jnp.full_like(target, self.rows.per_source))

    def target(self, number: Array) -> Array:
        """Its row of the result."""
        return number if self.rows.order is None else self.refs[-1][number]


class _Weights(NamedTuple):
    """One stack; with two `halves`, gate and up, a column of the result needs one of each."""

    stack: Any
    halves: int

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.stack.shape[1] // self.halves

    @property
    def in_matrix(self) -> int:
        """Columns of one matrix, so that a program's columns lie in one."""
        return self.stack.shape[1] // matrices_of(self.stack)

    @property
    def arrays(self) -> list[Array]:
        """What the kernel reads: the weights, or codes and scales in the order of the stack's fields."""
        stack = self.stack
        if isinstance(stack, FP8Stack):
            return [stack.codes, stack.scales]
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
    decode: Any  # (codes, absmax, NF4's table, dtype to round to, dtype) -> even and odd elements
    ahead: bool  # a step's operands are loaded during the step before

    @property
    def steps(self) -> int:
        """Steps along the contraction."""
        return self.x.shape[1] // self.depth

    def load(self, group: Array, column: Array, count: int, step: Any) -> tuple[Array, ...]:
        """What is read of the matrix for this step and `count` columns, as it lies in memory."""
        start, columns = step * self.depth, column + jnp.arange(count)
        stack = self.weights.stack
        if not isinstance(stack, QuantizedStack):
            return (self.refs[0][group, columns[:, None], (start + jnp.arange(self.depth))[None, :]],)
        _, out, inner = stack.shape
        matrix, row = jnp.int32(0), columns
        if (matrices := matrices_of(stack)) > 1:  # all columns of a program lie in one matrix
            matrix = jax.lax.div(column, jnp.int32(out // matrices))
            row = row - matrix * (out // matrices)
        if isinstance(stack, FP8Stack):
            block = start // FP8_BLOCK + jnp.arange(self.depth // FP8_BLOCK)
            inner_at = block[:, None] * FP8_BLOCK + jnp.arange(FP8_BLOCK)[None, :]
            codes = self.refs[0][group, columns[:, None, None], inner_at[None]]
            return codes, self.refs[1][group, matrix, (row // FP8_BLOCK)[:, None], block[None, :]]
        first = start // NF4_BLOCK
        block = (row * (inner // NF4_BLOCK))[:, None] + first + jnp.arange(self.depth // NF4_BLOCK)[None, :]
        codes = self.refs[0][group, matrix, block[:, :, None] * _HALF + jnp.arange(_HALF)[None, None, :]]
        absmax = self.refs[1][group, matrix, block]
        if len(self.refs) == 2:
            return codes, absmax
        nested_absmax, offset = self.refs[2:4]
        return codes, absmax, nested_absmax[group, matrix, block // NF4_NESTED_BLOCK], offset[group, matrix]

    def weights_of(self, loaded: tuple[Array, ...], dtype: Any) -> Array:
        """The weights [columns, depth] that were loaded, rounded to x's dtype and given in `dtype`."""
        if len(loaded) == 1:
            return loaded[0].astype(dtype)
        codes, absmax, *nested = loaded
        if isinstance(self.weights.stack, FP8Stack):
            weights = codes.astype(jnp.float32) * absmax.astype(jnp.float32)[:, :, None]
            return weights.astype(self.x.dtype).astype(dtype).reshape(len(codes), self.depth)
        if nested:
            # As in `jaxmoe.nf4.stack`: the bound changes no finite number, it keeps product and sum apart.
            product = jnp.minimum(self.refs[4][absmax.astype(jnp.int32)] * nested[0], jnp.finfo(jnp.float32).max)
            absmax = product + nested[1]
        absmax = jnp.broadcast_to(absmax[:, :, None], codes.shape)
        pairs = self.decode(codes, absmax, self.table, self.x.dtype, dtype)
        return jnp.stack(pairs, axis=-1).reshape(len(codes), self.depth)

    def sums(
        self, group: Array, column: Array, count: int, x_of: Callable[[Any], Array], add: Callable[..., Array]
    ) -> list[Array]:
        """For each half of the matrix, the sum of `add(loaded, x)` over all steps along the contraction.

        What the next step needs is loaded before this step's is used, except where Triton itself does that.
        """
        columns = [column + n * self.weights.columns for n in range(self.weights.halves)]

        def load(step: Any) -> tuple[list[tuple[Array, ...]], Array]:
            return [self.load(group, first, count, step) for first in columns], x_of(step)

        def used(accs: Sequence[Array], loaded: tuple[list[tuple[Array, ...]], Array]) -> list[Array]:
            return [add(acc, each, loaded[1]) for acc, each in zip(accs, loaded[0], strict=True)]

        shape = jax.eval_shape(lambda: used([jnp.zeros(())] * len(columns), load(0)))
        accs = [jnp.zeros(each.shape, jnp.float32) for each in shape]
        if not self.ahead:
            return jax.lax.fori_loop(0, self.steps, lambda step, accs: used(accs, load(step)), accs)

        def step(number: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
            accs, loaded = state
            following = load(number)
            return used(accs, loaded), following

        return used(*jax.lax.fori_loop(1, self.steps, step, (accs, load(0))))


def _looked_up(codes: Array, absmax: Array, table: Any, dtype: Any, wanted: Any) -> list[Array]:
    """The even and the odd elements of bytes of codes, rounded to `dtype` and given in `wanted`."""
    code = codes.astype(jnp.int32)
    return [(table[each] * absmax).astype(dtype).astype(wanted) for each in (code >> 4, code & 15)]


def _decoded_pairs(codes: Array, absmax: Array, table: Any, dtype: Any, wanted: Any) -> list[Array]:
    """As `_looked_up`, in assembly: each lane of a warp holds one value of the table, and a shuffle looks it up.

    A load would need an address for each element. Four bytes of codes are decoded at a time.
    """
    word = jax.ShapeDtypeStruct(codes.shape, jnp.int32)
    asm, lanes = triton.elementwise_inline_asm, jax.ShapeDtypeStruct(codes.shape, jnp.float32)
    (own,) = asm(
        _LANE_TABLE, args=[jnp.zeros(codes.shape, jnp.float32)], constraints="=f,f", pack=1, result_shape_dtypes=[lanes]
    )
    (words,) = asm(
        _DECODE.replace("TYPE", "bf16x2" if dtype == jnp.bfloat16 else "f16x2"),
        args=[codes, absmax, own],
        constraints=",".join(["=r"] * 4 + ["r"] + ["f"] * 8),
        pack=4,
        result_shape_dtypes=[word],
    )
    if dtype == jnp.bfloat16 and wanted == jnp.float32:  # the upper half of a float32
        return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in (words << 16, words & -65536)]
    halves = words.astype(jnp.int16), jax.lax.shift_right_logical(words, 16).astype(jnp.int16)
    return [jax.lax.bitcast_convert_type(half, dtype).astype(wanted) for half in halves]


def _lane_table() -> str:
    """Gives each lane of a warp the table's value of its own number, modulo 16."""
    bits = [f"0f{value:08X}" for value in NF4_TABLE.view(np.uint32)]
    choices = [f"setp.eq.u32 p, l, {i}; selp.f32 $0, {value}, $0, p;" for i, value in enumerate(bits[1:], 1)]
    head = f"{{ .reg .u32 l; .reg .pred p; mov.u32 l, %laneid; and.b32 l, l, 15; mov.f32 $0, {bits[0]};"
    return " ".join([head, *choices, "}"])


def _decode_asm() -> str:
    """Decodes four bytes ($4) with their absmax ($5 to $8) and the lane's value ($9) to four words of two ($0 to $3).

    The even element, in the high half of its byte, becomes the low half of the word.
    """
    lines = ["{ .reg .b32 c; .reg .f32 v0; .reg .f32 v1;"]
    for byte in range(4):
        for half, value in ((8 * byte + 4, "v0"), (8 * byte, "v1")):
            # 0x101f: the lane is chosen among the 16 of the own half by four bits
            lines += [f"shr.u32 c, $4, {half};", f"shfl.sync.idx.b32 {value}, $9, c, 0x101f, 0xffffffff;"]
            lines += [f"mul.rn.f32 {value}, {value}, ${5 + byte};"]
        lines += [f"cvt.rn.TYPE.f32 ${byte}, v1, v0;"]
    return " ".join([*lines, "}"])


_LANE_TABLE, _DECODE = _lane_table(), _decode_asm()


def _each_row(tile: _Tile, rows: _Listed, out: Any, column: Array, columns: int) -> None:
    """Multiplies the program's own row element by element; a program's threads add up their sums once, at the end."""
    number = rows.own
    group, source = rows.group(number), rows.source(number)

    def x_of(step: Any) -> Array:
        return tile.x[source, step * tile.depth + jnp.arange(tile.depth)]

    def add(acc: Array, loaded: tuple[Array, ...], x: Array) -> Array:
        return acc + tile.weights_of(loaded, jnp.float32) * x.astype(jnp.float32)[None]

    halves = [jnp.sum(acc, axis=-1) for acc in tile.sums(group, column, columns, x_of, add)]
    result = _finish(halves, tile.x.dtype)
    out[rows.target(number), column + jnp.arange(columns)] = result.astype(out.dtype)


def _rows_of_group(tile: _Tile, rows: _Listed, out: Any, column: Array, columns: int) -> None:
    """Multiplies all rows of a group on the tensor cores, if the program's row is the first of them."""
    number, count = rows.own, rows.rows.count
    group = rows.group(number)

    def of_group(position: Array) -> Array:
        return (position < count) & (rows.group(jnp.minimum(position, count - 1)) == group)

    def some(position: Array) -> Array:
        positions = position + jnp.arange(_TOGETHER)
        inside = jnp.minimum(positions, count - 1)
        source = rows.source(inside)

        def x_of(step: Any) -> Array:
            return tile.x[source[None, :], (step * tile.depth + jnp.arange(tile.depth))[:, None]]

        def add(acc: Array, loaded: tuple[Array, ...], x: Array) -> Array:
            return acc + jnp.dot(tile.weights_of(loaded, x.dtype), x, preferred_element_type=jnp.float32)

        result = _finish(tile.sums(group, column, columns, x_of, add), tile.x.dtype)
        own = (positions < count) & (rows.group(inside) == group)
        # Places of nothing are different from each other: the interpreter writes what is masked back.
        target = jnp.where(positions < count, rows.target(inside), positions)
        where = out.at[target[None, :], (column + jnp.arange(columns))[:, None]]
        triton.store(where, result.astype(out.dtype), mask=own[None, :])
        return position + _TOGETHER

    @pl.when((number == 0) | (rows.group(jnp.maximum(number - 1, 0)) != group))
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

    shares_launch = True

    def most_rows(self, *stacks: Any) -> int:
        """As `most_rows_of_kernels`."""
        return most_rows_of_kernels(stacks)

    def unsupported(self, dtype: Any, *stacks: Any) -> str | None:
        """Why it cannot multiply rows of this dtype with these stacks, or None."""
        return unsupported(dtype, *stacks)

    def products(
        self, x: Array, stacks: Sequence[Array | QuantizedStack], rows: Rows, dtype: Any, *, swiglu: bool = False
    ) -> list[Array]:
        """As `FewRows.products`."""
        return products(x, stacks, rows, dtype, swiglu=swiglu)


KERNEL = Kernel()
