"""Grouped matmul for Ampere and newer cards in Pallas Mosaic GPU: rows sorted by group, times their group's matrix.

    grouped_matmul   out[rows of a span] = x[rows of the span] @ W[group of the span]     (or W^T)
    grouped_outer    out[group] = sum over the group's rows of left[row]^T right[row]     (weight gradients)

It stands on mma.sync and cp.async, which every card from compute capability 8.0 on has. This file has the two public
functions and the checks of their arguments. `ampere_tiles` says how the work is cut, by card; `ampere_block` has what
both kernels share; `ampere_matmul` and `ampere_outer` have the programs. Layout of the rows and meaning of spans and
groups are those of `hopper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.kernels.ampere import default_capability, unsupported
from jaxmoe.ops.kernels.grouped_matmul import ampere_matmul, ampere_outer
from jaxmoe.ops.kernels.grouped_matmul.ampere_tiles import (
    TILE_ROWS,
    column_tile,
    default_tiles,
    fits_registers,
    span_rows,
)
from jaxmoe.ops.schedule import Schedule, Spans
from jaxmoe.ops.small_case import relative_error, why_not
from jaxmoe.quantized_stack import QuantizedStack

__all__ = ["AMPERE", "TILE_ROWS", "Ampere", "grouped_matmul", "grouped_outer"]

_WIDTH = 32  # sizes are multiples of it: two steps of mma.sync, and the columns of four warps


def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Float[Array, "groups a b"],
    spans: Spans,
    offset: Any = 0,
    *,
    transposed: bool,
    swiglu: bool = False,
    low: LowRankTerm | None = None,
    capability: tuple[int, int] | None = None,
    interpret: Any = None,
) -> Float[Array, "P out"]:
    """Multiplies each span of rows by its group's matrix. Sums are float32 and rounded once.

    Args:
        x: rows sorted by group, bfloat16 or float16; P is a multiple of 16.
        weight: [groups, out, inner] if `transposed` (x W^T), else [groups, inner, out] (x W).
        spans: which rows belong to which group, at most `span_rows` of the card in each.
        offset: added to the group for `weight`.
        transposed: the layout of all weights.
        swiglu: the product's first half is the gate, its second half is up, [groups, 2F, inner]. The result is
            silu(gate) * up, [P, F], of the rounded products. Needs `transposed`.
        low: a low-rank term that is also added. Its weight is laid out like `weight` with `rank` for `inner`; the
            offset is not added to its group.
        capability: the card whose tiles to take, the default device's by default.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.

    Raises:
        ValueError: a dtype, size or combination that the kernel does not support.
    """
    columns = weight.shape[1 if transposed else 2] // (2 if swiglu else 1)
    pairs = {"x": (x, weight)} | ({} if low is None else {"low": (low.rows, low.weight)})
    depths = tuple(matrix.shape[2 if transposed else 1] for _, matrix in pairs.values())
    _check_matmul(pairs, depths, columns, swiglu and not transposed)
    width = 2 * column_tile(min(columns, 64)) if swiglu else column_tile(columns)
    plan = ampere_matmul.Plan(
        rows=x.shape[0],
        transposed=transposed,
        swiglu=swiglu,
        columns=columns,
        depths=depths,
        tiles=default_tiles(width, depths, capability or default_capability()),
    )
    return ampere_matmul.run(plan, list(pairs.values()), spans, offset, interpret)


def grouped_outer(
    left: Float[Array, "P A"],
    right: Float[Array, "P C"],
    first: Int[Array, " E"],
    count: Int[Array, " E"],
    *,
    dtype: Any = jnp.float32,
    capability: tuple[int, int] | None = None,
    interpret: Any = None,
) -> Float[Array, "E A C"]:
    """For each group the sum over its rows of left[row]^T right[row], in float32: the gradient of a group's matrix.

    Padding rows inside a group must be zero in `left` or `right` and finite in the other.

    Args:
        left: rows sorted by group, bfloat16 or float16.
        right: rows sorted by group, of the same dtype.
        first: each group's first row, in units of 16 rows.
        count: each group's number of rows with its padding, in units of 16; a group without rows gets zeros.
        dtype: of the result.
        capability: the card, the default device's by default.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.

    Raises:
        ValueError: a dtype or size that the kernel does not support.
    """
    _check_pair("left and right", left, right)
    _check_sizes(left.shape[1], right.shape[1])
    plan = ampere_outer.OuterPlan(
        rows=left.shape[0],
        left_columns=left.shape[1],
        right_columns=right.shape[1],
        groups=first.shape[0],
        tile_rows=column_tile(left.shape[1]),
        tile_columns=column_tile(right.shape[1]),
        slots=3,
        unrolled=fits_registers(capability or default_capability()),
    )
    out = jax.ShapeDtypeStruct((first.shape[0], left.shape[1], right.shape[1]), dtype)
    return ampere_outer.run(plan, (left, right), (first, count), out, interpret)


def _check_matmul(
    pairs: dict[str, tuple[Array, Array]], depths: tuple[int, ...], columns: int, swiglu_untransposed: bool
) -> None:
    """Raises for what `grouped_matmul` does not support."""
    for (name, (left, matrix)), depth in zip(pairs.items(), depths, strict=True):
        _check_pair(name, left, matrix)
        if left.shape[1] != depth:
            raise ValueError(f"{name}: expected {depth} columns, as its weight has, found {left.shape[1]}")
        if left.shape[0] % TILE_ROWS:
            raise ValueError(f"{name}: expected a multiple of {TILE_ROWS} rows, found {left.shape[0]}")
    _check_sizes(*depths, columns)
    if swiglu_untransposed:
        raise ValueError("swiglu: expected a transposed weight")


def _check_pair(name: str, left: Array, right: Array) -> None:
    if left.dtype != right.dtype or left.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"{name}: expected bfloat16 or float16 on both sides, found {left.dtype} and {right.dtype}")


def _check_sizes(*sizes: int) -> None:
    if any(size % _WIDTH for size in sizes):
        raise ValueError(f"sizes: expected multiples of {_WIDTH}, found {', '.join(map(str, sizes))}")


class Ampere:
    """The implementation "mma" of the grouped products."""

    rank_multiple = 64  # of the low-rank term: with 32, all products would have half as deep steps
    min_linear_rows = 512  # with fewer rows a product reads the weight only once, and nothing is saved
    linear_decodes = False  # not timed with decoded ones

    def unsupported(self, dtype: Any, *widths: int) -> str | None:
        """Why it cannot run on rows of this dtype and these widths, or None; on a GPU it first runs a small case.

        Any width runs: where the kernel does not support one, zeros are added.
        """
        if (why := unsupported(dtype)) is not None:
            return why
        return _small_case(jnp.dtype(dtype).name) if widths and jax.default_backend() == "gpu" else None

    def tile_rows(self, routed_rows: int, num_experts: int) -> int:
        """16 for any load: the kernel works on several tiles at once."""
        return TILE_ROWS

    def span_rows(self, routed_rows: int, num_experts: int) -> tuple[int, ...]:
        """The limit for the rows of a span."""
        return (span_rows(default_capability()),)

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
        if isinstance(weight, QuantizedStack):  # one layer's experts are decoded at a time, for this product alone
            weight, offset = weight[offset + jnp.arange(schedule.first_tile.shape[0])], 0
        run = partial(grouped_matmul, transposed=transposed, swiglu=swiglu)
        out_axis, inner_axis = (1, 2) if transposed else (2, 1)
        halves = 2 if swiglu else 1
        inner, out = weight.shape[inner_axis], weight.shape[out_axis] // halves
        if inner % _WIDTH or out % _WIDTH:  # a copy of this layer's experts, not of the stack
            weight, offset = weight[offset + jnp.arange(schedule.first_tile.shape[0])], 0
            x, weight = _padded(x, 1), _padded(_padded(weight, inner_axis), out_axis, halves)
            low = low and low._replace(weight=_padded(low.weight, out_axis, halves))
        return run(x, weight, schedule.spans[span_rows(default_capability())], offset, low=low)[:, :out]

    def outer(self, left: Array, right: Array, schedule: Schedule) -> Array:
        """As `GroupedMatmul.outer`; the operands are padded to sizes that the kernel supports."""
        a, c = left.shape[1], right.shape[1]
        return grouped_outer(_padded(left, 1), _padded(right, 1), schedule.first_tile, schedule.tile_count)[:, :a, :c]

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
        """As `GroupedMatmul.linear`, by XLA: all that is summed is one product of matrices laid side by side.

        The library of the card is faster than a kernel here; the copies cost less than a result in float32.
        """
        rows = [x, *(each for each, _ in others)]
        matrices = [each[layer] for each in (stack, *(each for _, each in others))]
        if low is not None:
            rows, matrices = [*rows, low.rows], [*matrices, low.weight[0]]
        axis = 1 if transposed else 0
        sides = jnp.concatenate(rows, 1), jnp.concatenate(matrices, axis)
        return jax.lax.dot_general(*sides, (((1,), (axis,)), ((), ())), preferred_element_type=x.dtype)


def _padded(array: Array, axis: int, parts: int = 1) -> Array:
    """The array with zeros at the end of each of the equal parts of this axis, up to a multiple of `_WIDTH`."""
    size = array.shape[axis] // parts
    if size % _WIDTH == 0:
        return array
    split = array.reshape(*array.shape[:axis], parts, size, *array.shape[axis + 1 :])
    padding = [(0, 0)] * split.ndim
    padding[axis + 1] = 0, -size % _WIDTH
    return jnp.pad(split, padding).reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


@cache
def _small_case(dtype: str) -> str | None:
    return why_not(partial(small_error, dtype), "a small case")


def small_error(dtype: str = "bfloat16", interpret: Any = None) -> float:
    """The largest relative L2 error of the products of a few rows with two matrices, against float32."""
    rows, inner, out, first = 4 * TILE_ROWS, 128, 64, 3 * TILE_ROWS  # the first group's rows, then one unit
    begin, height = jnp.asarray([0, 3]), jnp.asarray([3, 1])
    spans = Spans(begin, height, jnp.arange(2), jnp.int32(2))
    exactly = partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")

    @jax.jit
    def errors(x: Array, d_y: Array, weight: Array) -> list[Array]:
        own = weight[(jnp.arange(rows) >= first).astype(jnp.int32)]
        y = grouped_matmul(x, weight, spans, transposed=True, interpret=interpret)
        d_x = grouped_matmul(d_y, weight, spans, transposed=False, interpret=interpret)
        d_weight = grouped_outer(d_y, x, begin, height, interpret=interpret)
        parts = zip(jnp.split(d_y, [first]), jnp.split(x, [first]), strict=True)
        return [
            relative_error(y, exactly("pi,poi->po", x, own)),
            relative_error(d_x, exactly("po,poi->pi", d_y, own)),
            relative_error(d_weight, jnp.stack([exactly("po,pi->oi", *pair) for pair in parts])),
        ]

    shapes = (rows, inner), (rows, out), (2, out, inner)
    operands = (jax.random.normal(jax.random.key(n), shape, dtype) for n, shape in enumerate(shapes))
    return float(jnp.max(jnp.stack(errors(*operands))))


AMPERE = Ampere()
