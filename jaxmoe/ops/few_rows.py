"""Products of a few rows, each with a matrix of its own choice: what a step of generating text consists of.

A layer, or an expert of a layer, is one matrix (a group) of a stack. Only the chosen ones are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops import implementations
from jaxmoe.ops.contraction import product
from jaxmoe.ops.swiglu import swiglu_of_product
from jaxmoe.quantized_stack import QuantizedStack

_COLUMNS = 32  # of a matrix that a kernel takes, or a multiple


class Rows(NamedTuple):
    """R products: which row of x is multiplied with which group of matrices, and which row of the result it is.

    Product number i gives row `order[i]` of the result, or row i without an order. It multiplies row n // `per_source`
    of x, for that row n of the result, by group `offset` + `group[i]`, or `offset` without groups. Products of one
    group follow each other, so that the group is read once for many of them, unless they are `separate`.
    """

    count: int
    group: Int[Array, " R"] | None
    order: Int[Array, " R"] | None
    offset: Int[Array, ""]
    per_source: int
    separate: bool

    @classmethod
    def of_layer(cls, rows: int, layer: Any) -> Rows:
        """All rows times the matrix of one layer."""
        return cls(rows, None, None, jnp.asarray(layer, jnp.int32), 1, rows == 1)

    @classmethod
    def of_experts(cls, experts: Int[Array, "M k"], offset: Any) -> Rows:
        """Each token times its k experts; `offset` is the group of expert 0. Row m*k + i is token m's i-th."""
        M, k = experts.shape
        group, order = experts.reshape(-1).astype(jnp.int32), None
        if M > 1:
            group, order = _in_order(group)
        return cls(M * k, group, order, jnp.asarray(offset, jnp.int32), k, M == 1)

    def listed(self) -> tuple[Int[Array, " R"], Int[Array, " R"], Int[Array, " R"]]:
        """(group, row of x, row of the result) of each product."""
        index = jnp.arange(self.count, dtype=jnp.int32)
        row = index if self.order is None else self.order
        return self.offset + (index * 0 if self.group is None else self.group), row // self.per_source, row


def _in_order(experts: Int[Array, " R"]) -> tuple[Int[Array, " R"], Int[Array, " R"]]:
    """(`experts` in ascending order, where each was).

    All pairs are compared: two small kernels on a GPU, where sorting takes four.
    """
    index = jnp.arange(len(experts), dtype=jnp.int32)
    own, other = experts[:, None], experts[None, :]
    place = jnp.sum((other < own) | ((other == own) & (index < index[:, None])), axis=1, dtype=jnp.int32)
    hit = place[:, None] == index
    ordered = lambda each: jnp.sum(jnp.where(hit, each[:, None], 0), axis=0)
    return ordered(experts), ordered(index)


def matrices_of(stack: Any) -> int:
    """How many matrices a group of the stack holds, each quantised separately."""
    match stack:
        case NF4Stack():
            return stack.codes.shape[-2]
        case FP8Stack():
            return stack.scales.shape[-3]
    return 1


def unsupported_by_kernels(dtype: Any, stack: Any) -> str | None:
    """Why no kernel can multiply rows of this dtype with this stack, or None."""
    capability = implementations.default_device().compute_capability
    if isinstance(stack, FP8Stack) and capability is not None and capability < (8, 9):
        return "needs weights in 16 bits or NF4 on this GPU, which has no instructions for FP8"
    if stack.dtype != dtype:
        return f"needs weights in {jnp.dtype(dtype).name}, found {jnp.dtype(stack.dtype).name}"
    *_, out, inner = stack.shape
    matrices = matrices_of(stack)
    if out // matrices % _COLUMNS or inner % 128:
        return f"needs matrices of a multiple of 32 by a multiple of 128, found {out // matrices} by {inner}"
    if isinstance(stack, QuantizedStack) and stack.places is not None:
        return f"needs stacks whose layers are all in {stack.form}"
    return None


def most_rows_of_kernels(stacks: Sequence[Any]) -> int:
    """For how many rows of x a kernel of few rows is the fastest way to multiply by these stacks.

    With more, rows are sorted by expert, and projections are plain products. In FP8, on a card whose grouped products
    decode e4m3 in registers, that is faster from 4 rows on (docs/log); 2 and 3 have not been measured.
    """
    in_registers = lambda stack: implementations.choose("fp8_products", stack.dtype, stack).name != "decoded"
    return 3 if any(isinstance(stack, FP8Stack) and in_registers(stack) for stack in stacks) else 32


@runtime_checkable
class FewRows(Protocol):
    """One implementation of the products of few rows."""

    shares_launch: bool  # projections, too, are faster with it

    def most_rows(self, *stacks: Any) -> int:
        """The most rows of x for which it is the fastest way to multiply by these stacks."""
        ...

    def unsupported(self, dtype: Any, *stacks: Any) -> str | None:
        """Why it cannot multiply rows of this dtype with these stacks, or None."""
        ...

    def products(
        self,
        x: Float[Array, "X inner"],
        stacks: Sequence[Float[Array, "groups _ inner"] | QuantizedStack],
        rows: Rows,
        dtype: Any,
        *,
        swiglu: bool = False,
    ) -> list[Float[Array, "R _"]]:
        """Each row of `rows` times its group's matrix of each stack, transposed; sums are float32.

        Args:
            x: where the rows are.
            stacks: matrices [out, inner] each.
            rows: which rows of x are multiplied with which matrices, and where the results go.
            dtype: of the results, which are rounded once.
            swiglu: the product is that of gate and up. It is rounded to x's dtype, and SwiGLU of it is returned.
        """
        ...


class Gathered:
    """The implementation "xla": one product after the other, each with its own matrix."""

    shares_launch = False

    def most_rows(self, *stacks: Any) -> int:
        """One: the products of several would follow each other."""
        return 1

    def unsupported(self, dtype: Any, *stacks: Any) -> str | None:
        """None: it runs anywhere."""
        return None

    def products(
        self, x: Array, stacks: Sequence[Array | QuantizedStack], rows: Rows, dtype: Any, *, swiglu: bool = False
    ) -> list[Array]:
        """As `FewRows.products`."""

        def one(number: tuple[Array, Array]) -> list[Array]:
            group, source = number
            row = jax.lax.dynamic_index_in_dim(x, source, keepdims=False)
            return [product("i,oi->o", row, stack[group]) for stack in stacks]

        group, source, target = rows.listed()
        found = [each[jnp.argsort(target)] for each in jax.lax.map(one, (group, source))]
        return [(swiglu_of_product(y.astype(x.dtype)) if swiglu else y).astype(dtype) for y in found]


GATHERED = Gathered()
