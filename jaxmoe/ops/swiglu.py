"""SwiGLU, the activation of every MLP, and its gradient for rows with router weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def swiglu(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """silu(gate) * up, in float32, rounded to gate's dtype once (Shazeer 2020)."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)


def swiglu_of_product(gate_up: Float[Array, "P F2"]) -> Float[Array, "P F"]:
    """SwiGLU of one product that holds the gate's columns, then those of up."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return swiglu(gate, up)


class Plain:
    """The implementation "xla" of SwiGLU's gradient."""

    def unsupported(self, gate_up: Any, in_scan: bool) -> str | None:
        """None: it runs anywhere."""
        return None

    def __call__(
        self, gate_up: Float[Array, "P F2"], d_hidden: Float[Array, "P F"], weight: Float[Array, "P 1"], **_: Any
    ) -> tuple[Float[Array, "P F"], Float[Array, "P F2"], Float[Array, " P"]]:
        """(SwiGLU again, the gradient of gate and up, that of each row's weight in float32).

        `d_hidden` is the gradient of `weight` * SwiGLU. `weight` times it is the gradient of SwiGLU's output. Its
        product with SwiGLU's output, summed over the row, is the gradient of `weight`.
        """
        hidden, pull = jax.vjp(swiglu_of_product, gate_up)
        d_weight = jnp.sum(hidden.astype(jnp.float32) * d_hidden.astype(jnp.float32), axis=-1)
        (d_gate_up,) = pull((d_hidden.astype(jnp.float32) * weight).astype(hidden.dtype))
        return hidden, d_gate_up, d_weight


PLAIN = Plain()
