"""The mixture of experts for a few tokens: each routed row times its own expert's matrices, without sorting into tiles.

Only the chosen experts' weights are read, in 16 bits or quantised. It has no backward pass of its own: `ops.experts`
uses it where nothing is differentiated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.contraction import PRECISION, product
from jaxmoe.ops.few_rows import FewRows, Rows
from jaxmoe.ops.low_rank import Factors
from jaxmoe.ops.swiglu import swiglu_of_product
from jaxmoe.quantized_stack import QuantizedStack


def few_experts(
    x: Float[Array, "M D"],
    experts: Int[Array, "M k"],
    weights: Float[Array, "M k"],
    stacks: tuple[Array | QuantizedStack, Array | QuantizedStack],
    offset: Any,
    adapters: tuple[Factors | None, Factors | None],
    kernel: FewRows,
) -> Float[Array, "M D"]:
    """The sum over k of each token's experts' outputs by `weights`, float32; roundings are those of `sorted_experts`.

    `stacks` are gate_up [groups, 2F, D] and down [groups, D, F]; `offset` is the group of expert 0.
    """
    M, k = experts.shape
    with jax.named_scope("permute"):
        rows = Rows.of_experts(experts, offset)
    with jax.named_scope("gate_up"):
        hidden = _product(x, stacks[0], rows, adapters[0], experts, kernel, swiglu=True)
    with jax.named_scope("down"):
        rows = rows._replace(per_source=1)  # a hidden row for each row of the result
        y = _product(hidden, stacks[1], rows, adapters[1], experts, kernel)
    with jax.named_scope("combine"):
        return jnp.einsum("mkd,mk->md", y.reshape(M, k, -1).astype(jnp.float32), weights, precision=PRECISION)


def _product(
    x: Array,
    stack: Array | QuantizedStack,
    rows: Rows,
    adapter: Factors | None,
    experts: Array,
    kernel: FewRows,
    swiglu: bool = False,
) -> Array:
    """Rows W^T + (rows A^T) B^T, or SwiGLU of it, rounded once; row m*k + i is that of token m's i-th expert."""
    if adapter is None:
        return kernel.products(x, [stack], rows, x.dtype, swiglu=swiglu)[0]
    (y,) = kernel.products(x, [stack], rows, jnp.float32)
    own = experts.reshape(-1)
    each = jnp.repeat(x, len(own) // len(x), axis=0)
    low = product("ri,rki->rk", each.astype(jnp.float32), adapter.a[own]).astype(x.dtype)
    y = (y + product("rk,rok->ro", low.astype(jnp.float32), adapter.b[own])).astype(x.dtype)
    return swiglu_of_product(y) if swiglu else y
