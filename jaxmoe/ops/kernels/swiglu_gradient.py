"""The gradients of SwiGLU and of its rows' routing weights in one pass over memory; XLA needs two or three.

A Pallas kernel in Triton, for any NVIDIA GPU; each program handles a few rows. It is faster only if the product of gate
and up is a separate array: XLA would first copy it out of the stack that a scan saves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

ROWS = 4  # per program
_WIDEST, _NARROWEST = 256, 64  # columns of an expert's hidden layer at a time: at most, at least


def unsupported(gate_up: Any) -> str | None:
    """Why `swiglu_gradient` cannot run on these rows [P, 2F]; None if it can."""
    rows, hidden = gate_up.shape[0], gate_up.shape[1] // 2
    if hidden % _NARROWEST:
        return f"needs experts whose width is a multiple of {_NARROWEST}, found {hidden}"
    if rows % ROWS:
        return f"needs a multiple of {ROWS} rows, found {rows}"
    return None


def swiglu_gradient(
    gate_up: Float[Array, "P F2"],
    d_hidden: Float[Array, "P F"],
    weight: Float[Array, "P 1"],
    *,
    with_hidden: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "P F"] | None, Float[Array, "P F2"], Float[Array, " P"]]:
    """The gradients of a row's weighted SwiGLU, and SwiGLU itself.

    Args:
        gate_up: gate in the first F columns, up in the others.
        d_hidden: the gradient of `weight` * SwiGLU. `weight` times it is the gradient of SwiGLU's output. Its product
            with SwiGLU's output, summed over the row, is the gradient of `weight`.
        weight: of each row, float32.
        with_hidden: also compute SwiGLU's output again.
        interpret: run in Pallas' interpreter, without a GPU.

    Returns:
        SwiGLU's output or None; the gradient of `gate_up`; the gradient of `weight`, float32.
    """
    (P, F), dtype = d_hidden.shape, gate_up.dtype
    chunk = next(size for size in (_WIDEST, _WIDEST // 2, _NARROWEST) if F % size == 0)
    # Columns of gate (and of the hidden layer), and of up, which follows gate.
    columns = [(slice(start, start + chunk), slice(F + start, F + start + chunk)) for start in range(0, F, chunk)]

    def body(gate_up_ref: Any, d_hidden_ref: Any, weight_ref: Any, d_gate_up_ref: Any, *refs: Any) -> None:
        # All loads come before the first store: no load is moved across a store, which might change its value.
        loaded = [(gate_up_ref[:, g], gate_up_ref[:, u], d_hidden_ref[:, g]) for g, u in columns]
        weight = weight_ref[:, :]
        total = jnp.zeros((ROWS,), jnp.float32)
        for (g, u), chunks in zip(columns, loaded, strict=True):
            hidden, product, d_gate, d_up = of_chunk(*chunks, weight)
            if with_hidden:
                refs[1][:, g] = hidden
            total += jnp.sum(product, axis=1)
            d_gate_up_ref[:, g], d_gate_up_ref[:, u] = d_gate, d_up
        refs[0][:] = total

    rows = lambda width: pl.BlockSpec((ROWS, width), lambda i: (i, 0))
    out = [jax.ShapeDtypeStruct((P, 2 * F), dtype), jax.ShapeDtypeStruct((P,), jnp.float32)]
    specs = [rows(2 * F), pl.BlockSpec((ROWS,), lambda i: (i,))]
    if with_hidden:
        out.append(jax.ShapeDtypeStruct((P, F), dtype))
        specs.append(rows(F))
    kernel = pl.pallas_call(
        body,
        grid=(P // ROWS,),
        out_shape=out,
        in_specs=[rows(2 * F), rows(F), rows(1)],
        out_specs=specs,
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )
    d_gate_up, d_weight, *hidden = kernel(gate_up, d_hidden, weight)
    return (hidden[0] if with_hidden else None), d_gate_up, d_weight


def of_chunk(gate: Array, up: Array, d_hidden: Array, weight: Array) -> tuple[Array, Array, Array, Array]:
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
    """The implementation "triton" of SwiGLU's gradient."""

    def unsupported(self, gate_up: Any, in_scan: bool) -> str | None:
        """Why it cannot run on these rows [P, 2F]; `in_scan`: they are part of a stack that a scan saves."""
        return "needs unrolled layers, found a scan over them" if in_scan else unsupported(gate_up)

    def __call__(
        self, gate_up: Array, d_hidden: Array, weight: Array, *, with_hidden: bool
    ) -> tuple[Array | None, Array, Array]:
        """As `swiglu_gradient`."""
        return swiglu_gradient(gate_up, d_hidden, weight, with_hidden=with_hidden)


ONE_PASS = OnePass()
