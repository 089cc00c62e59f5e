"""Contractions: every sum in float32, at full precision for float32 operands (never TF32).

An operation's result is rounded to the activations' dtype once, at its end. In bfloat16, transformers rounds more
often: after the normalisation, each rotary product, each factor of SwiGLU, and each sum of the residual stream (float32
here). This package is therefore closer to the exact result. In float32 both compute the same thing up to the order of
sums.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

PRECISION = jax.lax.Precision.HIGHEST
# An einsum whose sums and result are float32.
product = partial(jnp.einsum, precision=PRECISION, preferred_element_type=jnp.float32)


@jax.custom_vjp
def contract(x: Float[Array, "*batch inner"], weight: Float[Array, "out inner"]) -> Float[Array, "*batch out"]:
    """Forms x W^T in float32.

    The backward pass rounds the cotangent to x's dtype before it multiplies. Where the result was rounded to that
    dtype, this changes nothing; and a product of float32 with bfloat16 would run outside the tensor cores.
    """
    y: Array = product("...i,oi->...o", x, weight)
    return y


def _contract_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(x, weight), (x, weight)


def _contract_backward(residuals: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weight = residuals
    d_y = d_y.astype(x.dtype)
    d_x = product("...o,oi->...i", d_y, weight)
    d_weight = product("mo,mi->oi", d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, x.shape[-1]))
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


contract.defvjp(_contract_forward, _contract_backward)
