"""The gradients of SwiGLU and of its rows' routing weights in one pass over memory, in Pallas Mosaic GPU.

XLA needs two or three passes. The kernel is faster only if the product of gate and up is a separate array: XLA would
first copy it out of the stack that a scan saves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxmoe.ops.kernels import ampere
from jaxmoe.ops.kernels.row_tiles import WIDEST, across, load, rows_of

_CHUNKS = (WIDEST, WIDEST // 2, WIDEST // 4)  # columns of an expert's hidden layer at a time


def unsupported(gate_up: Any) -> str | None:
    """Why `swiglu_gradient` cannot run on these rows [P, 2F]; None if it can."""
    if (why := ampere.unsupported(gate_up.dtype)) is not None:
        return why
    rows, hidden = gate_up.shape[0], gate_up.shape[1] // 2
    if hidden % _CHUNKS[-1]:
        return f"needs experts whose width is a multiple of {_CHUNKS[-1]}, found {hidden}"
    if rows % rows_of(_chunk(hidden)):
        return f"needs a multiple of {rows_of(_chunk(hidden))} rows, found {rows}"
    return None


def _chunk(hidden: int) -> int:
    return next(size for size in _CHUNKS if hidden % size == 0)


def swiglu_gradient(
    gate_up: Float[Array, "P F2"],
    d_hidden: Float[Array, "P F"],
    weight: Float[Array, "P 1"],
    *,
    with_hidden: bool,
    interpret: Any = None,
) -> tuple[Float[Array, "P F"] | None, Float[Array, "P F2"], Float[Array, " P"]]:
    """The gradients of a row's weighted SwiGLU, and SwiGLU itself.

    Args:
        gate_up: gate in the first F columns, up in the others; in 16 bits.
        d_hidden: the gradient of `weight` * SwiGLU. `weight` times it is the gradient of SwiGLU's output. Its product
            with SwiGLU's output, summed over the row, is the gradient of `weight`.
        weight: of each row, float32.
        with_hidden: also compute SwiGLU's output again.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.

    Returns:
        SwiGLU's output or None; the gradient of `gate_up`; the gradient of `weight`, float32.
    """
    (P, F), dtype = d_hidden.shape, gate_up.dtype
    chunk = _chunk(F)
    rows = rows_of(chunk)

    def body(gate_up: Any, d_hidden: Any, weight: Any, d_gate_up: Any, d_weight: Any, *hidden: Any) -> None:
        own = pl.ds(lax.axis_index("tile") * rows, rows)
        starts = range(0, F, chunk)

        def at(ref: Any, start: int) -> Any:
            return ref.at[own, pl.ds(start, chunk)]

        # All loads come before the first store: no load is moved across a store, which might change its value.
        gates, ups, gradients = (
            [load(at(ref, first + start), chunk) for start in starts]
            for ref, first in ((gate_up, 0), (gate_up, F), (d_hidden, 0))
        )
        weights, total = across(load(weight.at[own], chunk, 0), (rows, chunk), 0), None
        for start, gate, up, gradient in zip(starts, gates, ups, gradients, strict=True):
            output, product, d_gate, d_up = _of_chunk(gate, up, gradient, weights)
            if with_hidden:
                ampere.store(output, at(hidden[0], start))
            part = jnp.sum(product, axis=1)
            total = part if total is None else total + part
            ampere.store(d_gate, at(d_gate_up, start))
            ampere.store(d_up, at(d_gate_up, F + start))
        assert total is not None
        ampere.store(total, d_weight.at[own])

    out = [jax.ShapeDtypeStruct((P, 2 * F), dtype), jax.ShapeDtypeStruct((P,), jnp.float32)]
    if with_hidden:
        out.append(jax.ShapeDtypeStruct((P, F), dtype))
    kernel = ampere.launch("swiglu_gradient", body, out, [], {"tile": P // rows}, interpret)
    gradient, of_weight, *outputs = kernel(gate_up, d_hidden, weight.reshape(-1))
    return (outputs[0] if with_hidden else None), gradient, of_weight


def _of_chunk(gate: Array, up: Array, d_hidden: Array, weight: Array) -> tuple[Array, Array, Array, Array]:
    """Of some columns: SwiGLU's output, its product with its gradient, and the gradients of gate and up."""
    dtype = gate.dtype
    gate, up, d = (values.astype(jnp.float32) for values in (gate, up, d_hidden))
    sigmoid = 1 / (1 + jnp.exp(-gate))
    silu = gate * sigmoid
    hidden = (silu * up).astype(dtype)  # rounded as in the forward pass
    product = hidden.astype(jnp.float32) * d
    d = d * weight
    return hidden, product, (d * up * (sigmoid + silu * (1 - sigmoid))).astype(dtype), (d * silu).astype(dtype)


class OnePass:
    """The implementation "mosaic" of SwiGLU's gradient."""

    def unsupported(self, gate_up: Any, in_scan: bool) -> str | None:
        """Why it cannot run on these rows [P, 2F]; `in_scan`: they are part of a stack that a scan saves."""
        return "needs unrolled layers, found a scan over them" if in_scan else unsupported(gate_up)

    def __call__(
        self, gate_up: Array, d_hidden: Array, weight: Array, *, with_hidden: bool
    ) -> tuple[Array | None, Array, Array]:
        """As `swiglu_gradient`."""
        return swiglu_gradient(gate_up, d_hidden, weight, with_hidden=with_hidden)


ONE_PASS = OnePass()
