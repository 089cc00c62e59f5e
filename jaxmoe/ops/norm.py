"""Root-mean-square normalisation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class StackedNorm(NamedTuple):
    """The norm of one layer: a stack of weights, the layer's place in it, and what is added to the mean square."""

    stack: Float[Array, "L D"]
    place: Int[Array, ""] | int
    eps: float

    @property
    def weight(self) -> Array:
        """The layer's own weight."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.place, keepdims=False)


def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Scales x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32, rounded to x's dtype once.

    Source: Zhang and Sennrich 2019; transformers' `Qwen3MoeRMSNorm`, which rounds before the weight as well.
    """
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)
