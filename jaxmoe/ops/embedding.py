"""The embedding of tokens, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def embed(table: Float[Array, "V D"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """The vectors of tokens, in float32.

    The gradient sums over a token's occurrences in float32 and rounds once to the table's dtype, as torch does on a
    GPU. XLA would add them up in that dtype.
    """
    return jnp.take(table, ids, axis=0).astype(jnp.float32)


def _embed_forward(table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return embed(table, ids), (table, ids)


def _embed_backward(residuals: tuple[Array, Array], d_rows: Array) -> tuple[Array, None]:
    table, ids = residuals
    return jnp.zeros(table.shape, jnp.float32).at[ids].add(d_rows).astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)
