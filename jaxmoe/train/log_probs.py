"""The log-probability of each token's label, without ever holding the logits of all tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.data.packing import Batch
from jaxmoe.ops.contraction import product
from jaxmoe.ops.frozen import define_vjp
from jaxmoe.train.loss import Outputs, in_chunks, log_sum_exp


def label_log_probs(outputs: Outputs, batch: Batch) -> Float[Array, "B T"]:
    """The log-probability of each token's label, whether it is learned or not."""
    hidden = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])
    found = token_log_probs(hidden, outputs.head, batch.labels.reshape(-1), outputs.chunk, outputs.frozen_head)
    return found.reshape(batch.labels.shape)


def learned_log_probs(outputs: Outputs, batch: Batch) -> Float[Array, "B T"]:
    """The same for the learned tokens, by their weights; 0 for the others."""
    return label_log_probs(outputs, batch) * batch.weights


def token_log_probs(
    hidden: Float[Array, "M D"],
    head: Float[Array, "V D"],
    labels: Int[Array, " M"],
    chunk: int = 1024,
    frozen_head: bool = False,
) -> Float[Array, " M"]:
    """Computes log softmax(hidden head^T)[label] of each token, in nats, float32.

    Only the logits (float32) of `chunk` tokens exist at a time. With `frozen_head` the head gets no gradient, and the
    logits are computed once: a token's gradient by its hidden state is known up to a factor, which the backward pass
    brings. Otherwise the backward pass computes them again, since the head's gradient sums over tokens.
    """
    count = hidden.shape[0]
    chunk = min(chunk, count)
    with jax.named_scope("head"):
        function = _frozen_head if frozen_head else _trained_head
        return function(in_chunks(hidden, chunk), in_chunks(labels, chunk), head).reshape(-1)[:count]


def _of_chunk(hidden: Array, labels: Array, head: Array) -> tuple[Array, Array, Array]:
    """(log-probabilities, logits, their log-sum-exp) of one chunk."""
    logits = product("md,vd->mv", hidden, head)
    log_sum = jax.lax.platform_dependent(logits, cuda=log_sum_exp, default=partial(jax.nn.logsumexp, axis=1))
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0] - log_sum, logits, log_sum


def _of_chunks(hidden: Array, labels: Array, head: Array) -> Array:
    return jax.lax.map(lambda piece: _of_chunk(piece[0], piece[1], head)[0], (hidden, labels))


_frozen_head = jax.custom_vjp(_of_chunks)
_trained_head = jax.custom_vjp(_of_chunks)


def _by_logits(logits: Array, log_sum: Array, labels: Array, factors: Array, dtype: Any) -> Array:
    """The gradient of the log-probabilities by the logits, times each token's factor, rounded to the head's dtype: a
    float32 product would run outside the tensor cores."""
    here = jnp.arange(logits.shape[1]) == labels[:, None]
    return (factors[:, None] * (here - jnp.exp(logits - log_sum[:, None]))).astype(dtype)


def _frozen_head_forward(hidden: Array, labels: Array, head: Array) -> tuple[Array, Array]:
    """(log-probabilities, the gradient of each by its hidden state), a chunk at a time."""

    def of_chunk(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        log_probs, logits, log_sum = _of_chunk(piece[0], piece[1], head)
        d_logits = _by_logits(logits, log_sum, piece[1], jnp.ones_like(log_probs), head.dtype)
        return log_probs, product("mv,vd->md", d_logits, head).astype(hidden.dtype)

    return jax.lax.map(of_chunk, (hidden, labels))


def _frozen_head_backward(d_hidden: Array, factors: Array) -> tuple[Array, None, None]:
    return (factors[..., None] * d_hidden.astype(jnp.float32)).astype(d_hidden.dtype), None, None


def _trained_head_forward(hidden: Array, labels: Array, head: Array) -> tuple[Array, Any]:
    return _of_chunks(hidden, labels, head), (hidden, labels, head)


def _trained_head_backward(residuals: Any, factors: Array) -> tuple[Array, None, Array]:
    """A chunk at a time; the head's gradient is summed in float32."""
    hidden, labels, head = residuals

    def of_chunk(d_head: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        states, names, factor = piece
        _, logits, log_sum = _of_chunk(states, names, head)
        d_logits = _by_logits(logits, log_sum, names, factor, head.dtype)
        d_hidden = product("mv,vd->md", d_logits, head)
        return d_head + product("mv,md->vd", d_logits, states), d_hidden.astype(states.dtype)

    zeros = jnp.zeros(head.shape, jnp.float32)
    d_head, d_hidden = jax.lax.scan(of_chunk, zeros, (hidden, labels, factors))
    return d_hidden, None, d_head.astype(head.dtype)


define_vjp(_frozen_head, _frozen_head_forward, _frozen_head_backward, frozen={2: "the head"})
define_vjp(_trained_head, _trained_head_forward, _trained_head_backward, frozen={})
