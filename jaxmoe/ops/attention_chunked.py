"""Causal attention in pure JAX, a chunk of queries at a time: runs anywhere and in any dtype.

A chunk sees only the keys that causality and the window allow, so half of the work is never done, and the logits of one
chunk fit into a cache. On a CPU this runs three times as fast as `jax.nn.dot_product_attention`, which forms logits of
size [B, N, T, T]. The backward pass recomputes each chunk's probabilities from the saved log-sum-exp (Dao et al. 2022,
algorithm 4); nothing of size [T, T] is saved for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.ops.attention_masked import attention_mask
from jaxmoe.ops.contraction import product
from jaxmoe.ops.kept import ATTENTION_LOG_SUM, ATTENTION_OUT

_MASKED = -1e30  # finite, so that a query that sees nothing gets a mean and not a NaN
_CHUNKS = 8  # each is compiled separately, because a chunk's keys have a static length
SHORTEST, LONGEST = 64, 1024  # queries per chunk; more chunks only where eight would hold too many logits


def chunk_length(length: int) -> int:
    """Queries of a chunk in sequences of `length` tokens."""
    return min(max(SHORTEST, -(-length // _CHUNKS)), LONGEST)


def _chunks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that some of them see) of each chunk."""
    step = chunk_length(length)
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop)


def _select(heads: Array, queries: slice) -> Array:
    """A chunk of [B, K, G, T, x], a group's query heads one after the other: [B, K, G * t, x]."""
    B, K, *_, width = heads.shape
    return heads[..., queries, :].reshape(B, K, -1, width)


def _logits(query: Array, key: Array, segments: Array, queries: slice, keys: slice, window: int | None) -> Array:
    """Masked logits [B, K, G * t, s] of one chunk, float32."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    mask = attention_mask(index[:, queries], index[:, keys], segments[:, queries], segments[:, keys], window)
    mask = jnp.tile(mask, (1, query.shape[2], 1))[:, None]
    logits = product("bkrh,bksh->bkrs", _select(query, queries), key[:, :, keys]) * query.shape[-1] ** -0.5
    return jnp.where(mask, logits, _MASKED)


class Chunked:
    """The implementation "blocks" of attention."""

    def unsupported(self, query: Any, key: Any, segments: Any = None) -> str | None:
        """None: it runs anywhere."""
        return None

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segments: Int[Array, "B T"] | None,
        window: int | None,
    ) -> Float[Array, "B T N H"]:
        """As `jaxmoe.ops.attention.causal_attention`."""
        B, T, N, H = query.shape
        if segments is None:
            segments = jnp.ones((B, T), jnp.int32)
        K = key.shape[2]
        grouped = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
        by_head = partial(jnp.transpose, axes=(0, 2, 1, 3))
        out: Array = _attend(grouped, by_head(key), by_head(value), segments, window)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


CHUNKED = Chunked()


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, segments: Array, window: int | None) -> Array:
    """`Chunked.attend` for query [B, K, G, T, H] and key, value [B, K, T, H]."""
    return _attend_forward(query, key, value, segments, window)[0]


def _attend_forward(query: Array, key: Array, value: Array, segments: Array, window: int | None):
    *lead, _, _ = query.shape
    outs, log_sums = [], []
    for queries, keys in _chunks(query.shape[3], window):
        logits = _logits(query, key, segments, queries, keys, window)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = product("bkrs,bksh->bkrh", weights.astype(value.dtype), value[:, :, keys]) / total
        outs.append(out.astype(query.dtype).reshape(*lead, -1, query.shape[-1]))
        log_sums.append((largest + jnp.log(total)).reshape(*lead, -1, 1))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), ATTENTION_OUT)
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), ATTENTION_LOG_SUM)
    return out, (query, key, value, segments, out, log_sum)


def _attend_backward(window: int | None, residuals: tuple[Array, ...], d_out: Array):
    query, key, value, segments, out, log_sum = residuals
    *lead, _, H = query.shape
    # sum_s p_s dp_s, the part of the softmax's derivative that all logits of a query share
    shared = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_query = []
    d_key, d_value = (jnp.zeros(a.shape, jnp.float32) for a in (key, value))
    for queries, keys in _chunks(query.shape[3], window):
        logits = _logits(query, key, segments, queries, keys, window)
        probabilities = jnp.exp(logits - _select(log_sum, queries))
        d_selected = _select(d_out, queries)
        d_probabilities = product("bkrh,bksh->bkrs", d_selected, value[:, :, keys])
        d_logits = probabilities * (d_probabilities - _select(shared, queries)) * H**-0.5
        d_logits, probabilities = d_logits.astype(query.dtype), probabilities.astype(query.dtype)
        d_chunk = product("bkrs,bksh->bkrh", d_logits, key[:, :, keys])
        d_query.append(d_chunk.astype(query.dtype).reshape(*lead, -1, H))
        d_key = d_key.at[:, :, keys].add(product("bkrs,bkrh->bksh", d_logits, _select(query, queries)))
        d_value = d_value.at[:, :, keys].add(product("bkrs,bkrh->bksh", probabilities, d_selected))
    return jnp.concatenate(d_query, axis=3), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
