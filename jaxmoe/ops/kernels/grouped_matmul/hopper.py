"""Grouped matmul for Hopper in Pallas Mosaic GPU: rows sorted by group, each multiplied by its group's matrix.

    grouped_matmul   out[rows of a span] = x[rows of the span] @ W[group of the span]     (or W^T)
    grouped_outer    out[group] = sum over the group's rows of left[row]^T right[row]     (weight gradients)

This file has the two public functions and the checks of their arguments. `hopper_tiles` says how the work is cut,
`hopper_ring` has what both kernels share, `hopper_matmul` and `hopper_outer` have the programs.

Row layout, made by `jaxmoe.ops.schedule.make_schedule`: the rows of a group are contiguous, and each group begins and
ends at a multiple of 16 rows. A span of the schedule is part of a group: at most 128 or 256 rows, a multiple of 16. The
spans of a group have nearly equal heights. Rows outside all spans are not written; the output is undefined there.

One span's life in `grouped_matmul`:

1. A thread block runs on each multiprocessor from start to end and works on its share of the items: an item is a span
   of rows times a tile of columns. Its producer warpgroup reads the span's first row and its group from the list.
2. The producer walks along the contraction in steps of 64. For each step it waits until a slot of the ring is free and
   then starts copies (TMA) of the span's rows and of the group's weights into it. It runs ahead by as many steps as
   the ring has slots.
3. Two consumer warpgroups wait until the slot is filled and multiply (wgmma) into float32 accumulators, each its own
   columns. They hand the slot back one step later, when its products are certain to have ended.
4. After the last step the epilogue applies SwiGLU if asked for, rounds once, puts the result into shared memory and
   starts the copy to the output. The consumers turn to the next item, whose first slots are already being filled.

The product is formed transposed, out^T = W x^T. wgmma's first dimension must be 64: that is columns of the output. The
rows are its second dimension, which may be any multiple of 8, so padding costs 8 rows per group on average; rows on the
first dimension would cost 32. There is code for a few heights; a span runs in the lowest one that holds it.

The weights of all layers are passed as one stack, [layers * E, out, in]. The group's index plus an offset selects the
matrix, and no slice is copied.

Both kernels need jax 0.11 or newer and compute capability 9.0; `jaxmoe.ops.implementations` checks this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.kernels.grouped_matmul import hopper_matmul, hopper_outer
from jaxmoe.ops.kernels.grouped_matmul.hopper_ring import CONSUMERS
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import (
    DEPTH,
    LARGE,
    SMALL,
    TILE_ROWS,
    OuterTiles,
    Tiles,
    default_outer_tiles,
    default_tiles,
)
from jaxmoe.ops.schedule import Schedule, Spans
from jaxmoe.quantized_stack import QuantizedStack

__all__ = [
    "HOPPER",
    "LARGE",
    "SMALL",
    "TILE_ROWS",
    "Hopper",
    "OuterTiles",
    "Tiles",
    "default_outer_tiles",
    "default_tiles",
    "grouped_matmul",
    "grouped_outer",
]


def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Float[Array, "groups a b"],
    spans: Spans,
    offset: Any = 0,
    *,
    transposed: bool,
    swiglu: bool = False,
    others: Sequence[tuple[Array, Array]] = (),
    low: LowRankTerm | None = None,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> Float[Array, "P out"]:
    """Multiplies each span of rows by its group's matrix. Sums are float32 and rounded once.

    Args:
        x: rows sorted by group, bfloat16 or float16.
        weight: [groups, out, inner] if `transposed` (x W^T), else [groups, inner, out] (x W).
        spans: which rows belong to which group.
        offset: added to the group for `weight` and for the weights of `others`.
        transposed: the layout of all weights.
        swiglu: the product's first half is the gate, its second half is up, [groups, 2F, inner]. The result is
            silu(gate) * up, [P, F], of the rounded products. Needs `transposed`.
        others: more pairs like (x, weight), of any inner width; their products are added before rounding.
        low: a low-rank term that is also added, its rank a multiple of 64. Its weight is laid out like `weight` with
            `rank` for `inner`; the offset is not added to its group.
        tiles: `default_tiles` for spans of at most 128 rows by default.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.

    Raises:
        ValueError: a dtype, size or combination that the kernel does not support.
    """
    columns = weight.shape[1 if transposed else 2]
    tiles = tiles or default_tiles(columns, swiglu=swiglu)
    pairs = {"x": (x, weight)} | {f"others[{n}]": pair for n, pair in enumerate(others)}
    with_offset = len(pairs)
    if low is not None:
        pairs["low"] = (low.rows, low.weight)
    plan = hopper_matmul.Plan(
        transposed=transposed,
        swiglu=swiglu,
        columns=columns // 2 if swiglu else columns,
        depths=tuple(matrix.shape[2 if transposed else 1] for _, matrix in pairs.values()),
        with_offset=with_offset,
        tiles=tiles,
    )
    _check_matmul(plan, pairs)
    return hopper_matmul.run(plan, list(pairs.values()), spans, offset, interpret)


def grouped_outer(
    left: Float[Array, "P A"],
    right: Float[Array, "P C"],
    first: Int[Array, " E"],
    count: Int[Array, " E"],
    *,
    columns: tuple[int, int] | None = None,
    dtype: Any = jnp.float32,
    tiles: OuterTiles | None = None,
    interpret: Any = None,
) -> Float[Array, "E a c"]:
    """For each group the sum over its rows of left[row]^T right[row], in float32: the gradient of a group's matrix.

    Padding rows inside a group must be zero in `left` or `right` and finite in the other.

    Args:
        left: rows sorted by group, bfloat16 or float16; A is a multiple of 64.
        right: rows sorted by group, of the same dtype.
        first: each group's first row, in units of 16 rows.
        count: each group's number of rows with its padding, in units of 16; a group without rows gets zeros.
        columns: (a, c), the columns of `left` and `right` that the result covers; multiples of 16, all by default. Used
            for an adapter's rank, which is padded to 64 for the tensor cores.
        dtype: of the result.
        tiles: `default_outer_tiles` by default.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.

    Raises:
        ValueError: a dtype or size that the kernel does not support.
    """
    P, A, C, E = *left.shape, right.shape[1], first.shape[0]
    a, c = columns or (A, C)
    if A % 64:
        raise ValueError(f"left: expected a multiple of 64 columns, found {A}")
    _check_pair("left and right", left, right)
    _check_sizes(A, C, a, c)
    if tiles is None:
        # A narrow left has its columns of the result shared by two warpgroups, 64 or more each.
        tiles = default_outer_tiles(128 if A == 64 and C % 128 else C, jnp.dtype(dtype).itemsize)
    plan = hopper_outer.OuterPlan(rows=P, left_columns=A, right_columns=C, groups=E, tiles=tiles)
    out = jax.ShapeDtypeStruct((E, a, c), dtype)
    return hopper_outer.run(plan, (left, right), (first, count), out, interpret)


def _check_matmul(plan: hopper_matmul.Plan, pairs: dict[str, tuple[Array, Array]]) -> None:
    """Raises for what `grouped_matmul` does not support."""
    for (name, (left, matrix)), depth in zip(pairs.items(), plan.depths, strict=True):
        _check_pair(name, left, matrix)
        if left.shape[1] != depth:
            raise ValueError(f"{name}: expected {depth} columns, as its weight has, found {left.shape[1]}")
    _check_sizes(*plan.depths, plan.columns)
    if "low" in pairs and plan.depths[-1] % DEPTH:
        raise ValueError(f"low: expected a multiple of {DEPTH} columns, found {plan.depths[-1]}")
    if plan.swiglu and not plan.transposed:
        raise ValueError("swiglu: expected a transposed weight")
    if plan.swiglu and plan.products > 2:
        raise ValueError(f"swiglu: expected tiles of 128 or 256 columns, found {plan.tiles.columns}")
    if plan.halved and any(height % (8 * CONSUMERS) for height in plan.tiles.heights):
        raise ValueError(f"swiglu: expected heights that are multiples of 16, found {plan.tiles.heights}")


def _check_pair(name: str, left: Array, right: Array) -> None:
    if left.dtype != right.dtype or left.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name}: expected bfloat16 or float16 on both sides, found {left.dtype} and {right.dtype}")


def _check_sizes(*sizes: int) -> None:
    if any(size % TILE_ROWS for size in sizes):
        raise ValueError(f"sizes: expected multiples of {TILE_ROWS}, found {', '.join(map(str, sizes))}")


class Hopper:
    """The implementation "mosaic" of the grouped products."""

    rank_multiple = 64  # of the low-rank term; two 16-bit terms of rank 32 or less fit without padding
    min_linear_rows = 512  # with fewer rows a product reads the weight only once, and XLA is as fast
    linear_decodes = True

    def unsupported(self, dtype: Any, *widths: int) -> str | None:
        """Why it cannot run on rows of this dtype and these widths, or None."""
        if tuple(int(part) for part in jax.__version__.split(".")[:2]) < (0, 11):
            return f"needs jax 0.11 or newer, found {jax.__version__}"
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            return f"needs bfloat16 or float16, found {jnp.dtype(dtype).name}"
        if odd := [width for width in widths if width % 16]:  # Pallas' narrowest swizzle is one of 16 values
            return f"needs widths that are multiples of 16, found {', '.join(map(str, odd))}"
        return None

    def tile_rows(self, routed_rows: int, num_experts: int) -> int:
        """16 for any load: the kernel works on several tiles at once."""
        return TILE_ROWS

    def span_rows(self, routed_rows: int, num_experts: int) -> tuple[int, ...]:
        """The limits for the rows of a span: one, or two if some products of a layer are faster with higher spans."""
        return (SMALL, LARGE) if routed_rows >= _LARGE_ROWS_NF4 * num_experts else (SMALL,)

    def matmul(
        self,
        x: Array,
        weight: Array | QuantizedStack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool = False,
        low: LowRankTerm | None = None,
    ) -> Array:
        """As `GroupedMatmul.matmul`; with `swiglu` the kernel never writes the product of gate and up."""
        num_experts = schedule.first_tile.shape[0]
        if (operation := _DECODING.get(type(weight))) is not None:
            products = choose(operation, x.dtype, weight).value
            if products.faster(schedule, low, swiglu=swiglu):
                options: Any = {"transposed": transposed, "swiglu": swiglu, "low": low}
                return products.matmul(x, weight, schedule, offset, **options)
        if isinstance(weight, QuantizedStack):  # one layer's experts are decoded at a time, for this product alone
            weight, offset = weight[offset + jnp.arange(num_experts)], 0
        # With SwiGLU higher spans were interpreted (the consumers swap halves), but not timed.
        large = weight.shape[1] * weight.shape[2] >= _LARGE_MATRIX and not swiglu
        large = large and schedule.destination.size >= _LARGE_ROWS * num_experts and LARGE in schedule.spans
        rows = LARGE if large else SMALL
        tiles = default_tiles(weight.shape[1 if transposed else 2], rows, swiglu)
        return grouped_matmul(
            x, weight, schedule.spans[rows], offset, transposed=transposed, swiglu=swiglu, low=low, tiles=tiles
        )

    def outer(self, left: Array, right: Array, schedule: Schedule) -> Array:
        """As `GroupedMatmul.outer`; the operands are padded to sizes that the kernel supports."""
        a, c = left.shape[1], right.shape[1]
        columns = a + -a % TILE_ROWS, c + -c % TILE_ROWS
        left = jnp.pad(left, ((0, 0), (0, -a % 64)))
        right = jnp.pad(right, ((0, 0), (0, max(columns[1], 64) - c)))
        return grouped_outer(left, right, schedule.first_tile, schedule.tile_count, columns=columns)[:, :a, :c]

    def linear(
        self,
        x: Array,
        stack: Array,
        layer: Array,
        *,
        transposed: bool,
        others: Sequence[tuple[Array, Array]] = (),
        low: LowRankTerm | None = None,
    ) -> Array:
        """As `GroupedMatmul.linear`: all rows are one group, and the layer is read in place from the stack."""
        if isinstance(stack, QuantizedStack):
            others = [(other_x, other[layer][None]) for other_x, other in others]
            stack, layer = stack[layer][None], jnp.int32(0)
        rows = LARGE if x.shape[0] >= _LARGE_LINEAR_ROWS else SMALL
        count = -(-x.shape[0] // rows)
        units = rows // TILE_ROWS
        index = jnp.arange(count, dtype=jnp.int32)
        spans = Spans(units * index, jnp.full_like(index, units), jnp.zeros_like(index), jnp.int32(count))
        # Every span has full height (rows past the end are not written), so only one height is compiled.
        tiles = default_tiles(stack.shape[1 if transposed else 2], rows)._replace(heights=(rows,))
        return grouped_matmul(x, stack, spans, layer, transposed=transposed, others=others, low=low, tiles=tiles)


_DECODING = {FP8Stack: "fp8_products", NF4Stack: "nf4_products"}  # operations that may decode in the kernel
# With at least so many rows per expert, and elements in its matrix, higher spans with fewer columns are faster.
_LARGE_ROWS, _LARGE_MATRIX = 1024, 2**21
_LARGE_LINEAR_ROWS = 16384  # the rows of a `linear` from which they are
_LARGE_ROWS_NF4 = 96  # rows per expert from which they are for weights in NF4

HOPPER = Hopper()
