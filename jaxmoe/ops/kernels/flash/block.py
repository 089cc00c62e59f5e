"""What the programs of flash attention share: sizes, masks, layouts and the ring of shared memory.

A program owns a tile of rows of one head and walks along tiles of others. Which of the two are queries differs: the
owned row o sees the walked row w if w lies between two bounds of o.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from jaxmoe.ops.kernels.ampere import shared_memory
from jaxmoe.ops.kernels.flash.tiles import Tiles

plgpu: Any = mosaic_gpu  # untyped: jax 0.10 lacks much of it

_PANEL = 32  # of a head's numbers that are read from shared memory at a time
_STEP = 16  # rows of a product's right side that are read at a time
MASKED = -1e30  # finite, so that differences of two of them are not NaN


class Shape(NamedTuple):
    """Sizes of a call: sequences, tokens, query heads, key heads, numbers in a head, and how many are not padding."""

    sequences: int
    tokens: int
    heads: int
    key_heads: int
    width: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads

    def flat(self, array: Array) -> Array:
        """[B, T, heads, H] as [B, T, heads * H], of which a tile is a rectangle."""
        return array.reshape(*array.shape[:2], -1)

    def tile(self, sequence: Array, row: Array, rows: int, head: Array) -> tuple[Any, ...]:
        """Where the tile of a head with the rows from `row` on lies in a flat array."""
        return sequence, pl.ds(row, rows), pl.ds(head * self.width, self.width)

    @property
    def scale(self) -> float:
        """Of the logits, 1 / sqrt(H)."""
        return self.head_dim**-0.5

    @property
    def scale_base_2(self) -> float:
        """Of the logits, for powers of two."""
        return self.scale * 1.4426950408889634


def layout(dtype: Any) -> Any:
    """The layout of a product's sums: 16 rows to each of the four warps."""
    return plgpu.Layout.MMA_ACC(dtype, m_warps=4)


def zeros(rows: int, columns: int, dtype: Any) -> Array:
    """Sums that are zero; `dtype` is that of the operands."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), layout(dtype))


def by_row(value: float, rows: int, dtype: Any) -> Array:
    """A number for each row of a tile of sums."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), layout(dtype).reduce(1))


def load(ref: Any, axis: int, dtype: Any) -> Array:
    """Numbers from device memory, one for each row (axis 0) or column (axis 1) of a tile of sums."""
    return plgpu.load(ref, layout=layout(dtype).reduce(1 - axis), optimized=False)


def across(numbers: Array, shape: tuple[int, ...], axis: int) -> Array:
    """A tile of sums whose rows (axis 0) or columns (axis 1) are these numbers."""
    return lax.broadcast_in_dim(numbers, shape, (axis,))


def product_transposed(left: Any, right: Any) -> Array:
    """The product left @ right^T of two tiles [rows, width] in shared memory; `left` may be `held` in registers."""
    in_registers = isinstance(left, tuple)
    sums = zeros((left[0] if in_registers else left).shape[0], right.shape[0], right.dtype)
    for part, start in zip(left if in_registers else _parts(left), range(0, right.shape[1], _PANEL), strict=True):
        panel = right.at[:, slice(start, start + _PANEL)].transpose((1, 0))
        sums = plgpu.mma(sums, part, plgpu.load(panel, layout=plgpu.Layout.MMA_RHS(right.dtype, m_warps=4)))
    return sums


def held(tile: Any) -> tuple[Array, ...]:
    """A tile [rows, width] of shared memory in registers, as the left operand of a product."""
    return tuple(_parts(tile))


def _parts(tile: Any) -> Iterator[Array]:
    """The tile's panels as left operands, each read when it is wanted."""
    operand = plgpu.Layout.MMA_LHS(tile.dtype, m_warps=4)
    for start in range(0, tile.shape[1], _PANEL):
        yield plgpu.load(tile.at[:, slice(start, start + _PANEL)], layout=operand)


def add_product(sums: Array, left: Array, right: Any) -> Array:
    """`sums` plus left @ right: a tile of sums, rounded to the operands' dtype, and a tile in shared memory."""
    rounded = left.astype(right.dtype)
    for start in range(0, right.shape[0], _STEP):
        a = as_left(rounded[:, start : start + _STEP])
        b = plgpu.load(right.at[pl.ds(start, _STEP)], layout=plgpu.Layout.MMA_RHS(right.dtype, m_warps=4))
        sums = plgpu.mma(sums, a, b)
    return sums


def as_left(values: Array) -> Array:
    """A tile of sums in 16 bits as the left operand of a product.

    The two layouts give each thread the same numbers in the same order: two tiles of 8 columns are one of 16.
    """
    rows, columns = values.shape
    operand = plgpu.Layout.MMA_LHS(values.dtype, m_warps=4)

    @plgpu.inline_mgpu(
        arg_types=(layout(values.dtype),),
        return_type=plgpu.ShapeDtypeStruct((rows, columns), values.dtype, layout=operand),
    )
    def relabelled(_: Any, fragments: Any) -> Any:
        target = operand.to_mgpu()
        registers = fragments.registers.reshape(target.registers_shape((rows, columns)))
        return type(fragments)(_registers=registers, _layout=target, _is_signed=None)

    return relabelled(values)


class Bounds(NamedTuple):
    """Which walked rows an owned row o sees: those from `first[o]` to `last[o]`; None stands for o itself.

    Both rise with o. `all_first` and `all_last` are the bounds of the rows that all owned ones see.
    """

    first: Array | None
    last: Array | None
    all_first: Array
    all_last: Array

    def mask(self, logits: Array, row: Array, walked: Array, dtype: Any) -> Array:
        """`logits` of the owned rows from `row` and the walked ones from `walked` on, large negative where unseen.

        They are scaled before: a multiplication and a later subtraction may become one instruction, and of large
        numbers that are equal the difference would then not be zero.
        """

        def partly(logits: Array) -> Array:
            shape = logits.shape
            own, other = (
                plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout(dtype)) + start
                for axis, start in ((0, row), (1, walked))
            )
            first, last = (own if bound is None else across(bound, shape, 0) for bound in (self.first, self.last))
            return jnp.where((other >= first) & (other <= last), logits, MASKED)

        seen = (walked >= self.all_first) & (walked + logits.shape[1] - 1 <= self.all_last)
        return lax.cond(seen, lambda logits: logits, partly, logits)


def scratch(tiles: Tiles, owned: int, width: int, dtype: Any) -> list[Any]:
    """Shared memory for the owned tiles and for the slots of two walked ones."""
    owned_tile = shared_memory((tiles.rows, width), dtype, _PANEL)
    walked = shared_memory((tiles.slots, tiles.walked, width), dtype, _PANEL)
    return [*[owned_tile] * owned, walked, walked]


def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The description of an output."""
    return jax.ShapeDtypeStruct(shape, dtype)
