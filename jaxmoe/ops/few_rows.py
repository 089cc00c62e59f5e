"""Products of a few rows, each with a matrix of its own choice: what a step of generating text consists of.

A layer, or an expert of a layer, is one matrix (a group) of a stack. Only the chosen ones are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.contraction import product
from jaxmoe.ops.swiglu import swiglu_of_product


class Rows(NamedTuple):
    """R products: which row of x is multiplied with which group, and which row of the result it is.

    Products of one group follow each other, so that the group is read once for many of them, unless `separate` says
    that no two have the same group.
    """

    group: Int[Array, " R"]
    source: Int[Array, " R"]
    target: Int[Array, " R"]
    separate: bool
    most_groups: int

    @classmethod
    def of_layer(cls, rows: int, layer: Any) -> Rows:
        """All rows times the matrix of one layer."""
        index = jnp.arange(rows, dtype=jnp.int32)
        return cls(jnp.broadcast_to(jnp.asarray(layer, jnp.int32), (rows,)), index, index, rows == 1, 1)

    @classmethod
    def of_experts(cls, experts: Int[Array, "M k"], offset: Any) -> Rows:
        """Each token times its k experts; `offset` is the group of expert 0. Product m*k + i is token m's i-th."""
        M, k = experts.shape
        index = jnp.arange(M * k, dtype=jnp.int32)
        groups = experts.reshape(-1).astype(jnp.int32) + offset
        if M > 1:
            groups, index = jax.lax.sort((groups, index), num_keys=1)
        return cls(groups, index // k, index, M == 1, M * k)


@runtime_checkable
class FewRows(Protocol):
    """One implementation of the products of few rows."""

    most_rows: int  # with more rows of x, sorting them by expert is as fast
    shares_launch: bool  # projections, too, are faster with it

    def unsupported(self, dtype: Any, *stacks: Any) -> str | None:
        """Why it cannot multiply rows of this dtype with these stacks, or None."""
        ...

    def products(
        self,
        x: Float[Array, "X inner"],
        stacks: Sequence[Float[Array, "groups _ inner"] | NF4Stack],
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

    most_rows = 1
    shares_launch = False

    def unsupported(self, dtype: Any, *stacks: Any) -> str | None:
        """None: it runs anywhere."""
        return None

    def products(
        self, x: Array, stacks: Sequence[Array | NF4Stack], rows: Rows, dtype: Any, *, swiglu: bool = False
    ) -> list[Array]:
        """As `FewRows.products`."""

        def one(number: tuple[Array, Array]) -> list[Array]:
            group, source = number
            row = jax.lax.dynamic_index_in_dim(x, source, keepdims=False)
            return [product("i,oi->o", row, stack[group]) for stack in stacks]

        found = [each[jnp.argsort(rows.target)] for each in jax.lax.map(one, (rows.group, rows.source))]
        return [(swiglu_of_product(y.astype(x.dtype)) if swiglu else y).astype(dtype) for y in found]


GATHERED = Gathered()
