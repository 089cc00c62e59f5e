"""One pass over memory where XLA takes several: norm and rotation of queries and keys, and the gradient of SwiGLU.

Pallas kernels by Triton, for any NVIDIA GPU; each program takes some rows. What they compute is
`layers.apply_rotary(layers.rms_norm(x))` and the gradient of `layers.swiglu`, rounded where those round, but for the
gradients' intermediate results, which stay in float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

ROWS = 32  # heads of tokens a program takes
_CHUNK = 256  # columns of an expert's hidden layer it takes at a time


def rotary_obstacle(x: Array) -> str | None:
    """Why `norm_rotary` does not take these queries or keys [B, T, heads, H] (None: it does)."""
    half = x.shape[-1] // 2
    if half & (half - 1) or half < 16:
        return f"needs heads of 32, 64, 128, ... columns, found {x.shape[-1]}"
    if (rows := math.prod(x.shape[:-1])) % ROWS:
        return f"needs a multiple of {ROWS} heads over all tokens, found {rows}"
    return None


def swiglu_obstacle(gate_up: Array) -> str | None:
    """Why `swiglu_gradient` does not take these rows [P, 2F] (None: it does)."""
    if (hidden := gate_up.shape[1] // 2) % _CHUNK:
        return f"needs experts whose width is a multiple of {_CHUNK}, found {hidden}"
    return None


def _call(body: Any, grid: int, out: Any, in_specs: list[Any], out_specs: Any, *, interpret: bool) -> Any:
    from jax.experimental.pallas import triton

    return pl.pallas_call(
        body,
        grid=(grid,),
        out_shape=out,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def norm_rotary(
    x: Float[Array, "B T heads H"],
    weight: Float[Array, " H"],
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    eps: float,
    interpret: bool = False,
) -> Float[Array, "B T heads H"]:
    """RMSNorm over each head, then the rotation of its pairs (i, i + H/2); `weight` is frozen and gets no gradient."""
    return _rotary(x, None, weight, cos, sin, eps, interpret)


def _norm_rotary_forward(x, weight, cos, sin, eps, interpret):
    return _rotary(x, None, weight, cos, sin, eps, interpret), (x, weight, cos, sin)


def _norm_rotary_backward(eps, interpret, residuals, d_out):
    x, weight, cos, sin = residuals
    return _rotary(x, d_out, weight, cos, sin, eps, interpret), None, None, None


norm_rotary.defvjp(_norm_rotary_forward, _norm_rotary_backward)


def _rotary(x: Array, d_out: Array | None, weight: Array, cos: Array, sin: Array, eps: float, interpret: bool) -> Array:
    """The output, or the gradient of x where that of the output is given."""
    heads, H = x.shape[-2:]
    half = H // 2
    flat = (-1, H)
    operands = [x.reshape(flat), *([] if d_out is None else [d_out.reshape(flat)])]
    tables = [weight.astype(jnp.float32).reshape(1, H), cos.reshape(-1, half), sin.reshape(-1, half)]

    def halves(ref: Any) -> tuple[Array, Array]:
        return ref[:, :half].astype(jnp.float32), ref[:, half:].astype(jnp.float32)

    def body(*refs: Any) -> None:
        *data, weight_ref, cos_ref, sin_ref, out_ref = refs
        first, second = halves(data[0])
        w_first, w_second = halves(weight_ref)
        token = (pl.program_id(0) * ROWS + jnp.arange(ROWS)) // heads
        cos, sin = (ref[token[:, None], jnp.arange(half)[None, :]] for ref in (cos_ref, sin_ref))
        mean = (jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)) / H
        scale = jax.lax.rsqrt(mean + eps)[:, None]
        first, second = first * scale, second * scale
        if d_out is None:
            first, second = (
                (part * w).astype(x.dtype).astype(jnp.float32) for part, w in ((first, w_first), (second, w_second))
            )
            result = first * cos - second * sin, second * cos + first * sin
        else:
            d_first, d_second = halves(data[1])
            d_first, d_second = (d_first * cos + d_second * sin) * w_first, (d_second * cos - d_first * sin) * w_second
            along = (jnp.sum(first * d_first, axis=1) + jnp.sum(second * d_second, axis=1))[:, None] / H
            result = scale * (d_first - first * along), scale * (d_second - second * along)
        out_ref[:, :half], out_ref[:, half:] = (part.astype(x.dtype) for part in result)

    rows = operands[0].shape[0]
    block = pl.BlockSpec((ROWS, H), lambda i: (i, 0))
    whole = pl.BlockSpec((1, H), lambda i: (0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = jax.ShapeDtypeStruct((rows, H), x.dtype)
    specs = [*[block] * len(operands), whole, anywhere, anywhere]
    return _call(body, rows // ROWS, out, specs, block, interpret=interpret)(*operands, *tables).reshape(x.shape)


def swiglu_gradient(
    gate_up: Float[Array, "P F2"],
    d_hidden: Float[Array, "P F"],
    weight: Float[Array, "P 1"],
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "P F2"], Float[Array, " P"]]:
    """The gradient of gate and up, [P, 2F], and of each row's weight.

    `d_hidden` is the gradient of a row's unweighted result: `weight` times it reaches SwiGLU, and its product with
    SwiGLU's output, summed over the row, is the gradient of `weight`.
    """
    P, F = d_hidden.shape
    rows = math.gcd(P, 16)

    def body(gate_up_ref: Any, d_hidden_ref: Any, weight_ref: Any, d_gate_up_ref: Any, d_weight_ref: Any) -> None:
        total = jnp.zeros((rows,), jnp.float32)
        for start in range(0, F, _CHUNK):
            gate_columns, up_columns = (slice(first, first + _CHUNK) for first in (start, F + start))
            gate, up = (gate_up_ref[:, columns].astype(jnp.float32) for columns in (gate_columns, up_columns))
            d = d_hidden_ref[:, gate_columns].astype(jnp.float32)
            sigmoid = 1 / (1 + jnp.exp(-gate))
            hidden = (gate * sigmoid * up).astype(gate_up.dtype).astype(jnp.float32)
            total += jnp.sum(hidden * d, axis=1)
            d = (d * weight_ref[:, :]).astype(gate_up.dtype).astype(jnp.float32)
            d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
            d_gate_up_ref[:, gate_columns] = d_gate.astype(gate_up.dtype)
            d_gate_up_ref[:, up_columns] = (d * gate * sigmoid).astype(gate_up.dtype)
        d_weight_ref[:] = total

    block = lambda width: pl.BlockSpec((rows, width), lambda i: (i, 0))
    out = jax.ShapeDtypeStruct(gate_up.shape, gate_up.dtype), jax.ShapeDtypeStruct((P,), jnp.float32)
    specs = [block(2 * F), block(F), block(1)]
    out_specs = block(2 * F), pl.BlockSpec((rows,), lambda i: (i,))
    return _call(body, P // rows, out, specs, out_specs, interpret=interpret)(gate_up, d_hidden, weight)
