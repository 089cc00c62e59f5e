"""Next-token cross-entropy that never holds the logits of all tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.layers import PRECISION


def cross_entropy(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " M"],
    weights: Float[Array, " M"],
    chunk: int = 1024,
) -> Float[Array, ""]:
    """Weighted sum over tokens of -log softmax(hidden head^T)[label], in nats, float32.

    The logits (float32) of `chunk` tokens exist at a time, in the forward pass and again in the backward pass. Divide
    by the sum of the weights for the mean. A token of weight 0 contributes nothing, whatever its label.
    """
    tokens = hidden.shape[0]
    chunk = min(chunk, tokens)
    pad = -tokens % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
    labels, weights = jnp.pad(labels, (0, pad)), jnp.pad(weights, (0, pad))

    @jax.checkpoint
    def chunk_loss(rows: Array, labels: Array, weights: Array) -> Array:
        logits = jnp.einsum("md,vd->mv", rows, head, precision=PRECISION, preferred_element_type=jnp.float32)
        target = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=1) - target))

    def step(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + chunk_loss(*piece), None

    pieces = hidden.reshape(-1, chunk, hidden.shape[1]), labels.reshape(-1, chunk), weights.reshape(-1, chunk)
    with jax.named_scope("head"):
        return jax.lax.scan(step, jnp.zeros((), jnp.float32), pieces)[0]
