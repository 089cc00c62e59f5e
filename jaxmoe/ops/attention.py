"""Causal grouped-query attention over whole sequences; its oracle is `layers.attention`.

On recent NVIDIA GPUs cuDNN does it (`jaxmoe.ops.attention_cudnn`). Elsewhere, and for what cuDNN does not take, it runs in pure JAX,
a block of queries at a time. A block sees only the keys that causality and the window allow, so half of the work is
never done, and the logits of one block fit a cache: on a CPU this runs three times as fast as
`jax.nn.dot_product_attention`, which forms all of [B, N, T, T]. The backward pass recomputes each block's probabilities
from the saved log-sum-exp (Dao et al. 2022, algorithm 4); nothing of size [T, T] is saved for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.ops import attention_cudnn as cudnn
from jaxmoe.ops.implementations import Choice, choose
from jaxmoe.ops.linear import attention_mask, product

_MASKED = -1e30  # finite, so that a query that sees nothing gets a mean and not a NaN
_BLOCKS = 8  # each is compiled on its own, for a block's keys have a static length
_MIN_ROWS, _MAX_ROWS = 64, 1024  # of a block: more blocks only where eight would hold too many logits


def block_rows(length: int) -> int:
    """Queries of a block in rows of `length` tokens."""
    return min(max(_MIN_ROWS, -(-length // _BLOCKS)), _MAX_ROWS)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """(queries, keys that some of them see) of each block."""
    rows = block_rows(length)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        first = 0 if window is None else max(0, start - window + 1)
        yield slice(start, stop), slice(first, stop)


def _rows(heads: Array, rows: slice) -> Array:
    """The block's rows of [B, K, G, T, x], a group's query heads under each other: [B, K, G * t, x]."""
    B, K, *_, width = heads.shape
    return heads[..., rows, :].reshape(B, K, -1, width)


def _logits(query: Array, key: Array, segments: Array, rows: slice, keys: slice, window: int | None) -> Array:
    """Masked logits [B, K, G * t, s] of one block, float32."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    mask = attention_mask(index[:, rows], index[:, keys], segments[:, rows], segments[:, keys], window)
    mask = jnp.tile(mask, (1, query.shape[2], 1))[:, None]
    logits = product("bkrh,bksh->bkrs", _rows(query, rows), key[:, :, keys]) * query.shape[-1] ** -0.5
    return jnp.where(mask, logits, _MASKED)


def implementation(dtype: Any, heads: int, kv_heads: int, head_dim: int) -> Choice:
    """How attention of these operands runs on the default device, and why; packed rows may still be refused."""
    query, key = (jax.ShapeDtypeStruct((1, _MIN_ROWS, n, head_dim), dtype) for n in (heads, kv_heads))
    return choose("attention", {"cudnn": cudnn.obstacle(query, key)})


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax(q k^T / sqrt(H)) v over earlier tokens of the same segment; logits and softmax in float32.

    A segment is a contiguous run of equal ids. Segment 0 is padding: nobody sees it, and what it gets itself is finite
    and meaningless. Without `segments` each row is one. Saved for the backward pass are, beside the operands, the
    output and the log-sum-exp, named `cudnn.OUT` and `cudnn.LOG_SUM` for recomputation policies.
    """
    B, T, N, H = query.shape
    if sliding_window is not None and sliding_window >= T:
        sliding_window = None
    taken = choose("attention", {"cudnn": cudnn.obstacle(query, key, segments)})
    with jax.named_scope("dot_product_attention"):
        if taken.name == "cudnn":
            return cudnn.causal_attention(query, key, value, segments, sliding_window)
        if segments is None:
            segments = jnp.ones((B, T), jnp.int32)
        K = key.shape[2]
        grouped = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
        by_head = partial(jnp.transpose, axes=(0, 2, 1, 3))
        out: Array = _attend(grouped, by_head(key), by_head(value), segments, sliding_window)
        return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(query: Array, key: Array, value: Array, segments: Array, window: int | None) -> Array:
    """The same for query [B, K, G, T, H] and key, value [B, K, T, H]."""
    return _attend_forward(query, key, value, segments, window)[0]


def _attend_forward(query: Array, key: Array, value: Array, segments: Array, window: int | None):
    *lead, _, _ = query.shape
    outs, log_sums = [], []
    for rows, keys in _blocks(query.shape[3], window):
        logits = _logits(query, key, segments, rows, keys, window)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = product("bkrs,bksh->bkrh", weights.astype(value.dtype), value[:, :, keys]) / total
        outs.append(out.astype(query.dtype).reshape(*lead, -1, query.shape[-1]))
        log_sums.append((largest + jnp.log(total)).reshape(*lead, -1, 1))
    out = checkpoint_name(jnp.concatenate(outs, axis=3), cudnn.OUT)
    log_sum = checkpoint_name(jnp.concatenate(log_sums, axis=3), cudnn.LOG_SUM)
    return out, (query, key, value, segments, out, log_sum)


def _attend_backward(window: int | None, residuals: tuple[Array, ...], d_out: Array):
    query, key, value, segments, out, log_sum = residuals
    *lead, _, H = query.shape
    # sum_s p_s dp_s, the part of the softmax's derivative that a row shares
    shared = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    d_query = []
    d_key, d_value = (jnp.zeros(a.shape, jnp.float32) for a in (key, value))
    for rows, keys in _blocks(query.shape[3], window):
        logits = _logits(query, key, segments, rows, keys, window)
        probabilities = jnp.exp(logits - _rows(log_sum, rows))
        d_rows = _rows(d_out, rows)
        d_probabilities = product("bkrh,bksh->bkrs", d_rows, value[:, :, keys])
        d_logits = probabilities * (d_probabilities - _rows(shared, rows)) * H**-0.5
        d_logits, probabilities = d_logits.astype(query.dtype), probabilities.astype(query.dtype)
        d_block = product("bkrs,bksh->bkrh", d_logits, key[:, :, keys])
        d_query.append(d_block.astype(query.dtype).reshape(*lead, -1, H))
        d_key = d_key.at[:, :, keys].add(product("bkrs,bkrh->bksh", d_logits, _rows(query, rows)))
        d_value = d_value.at[:, :, keys].add(product("bkrs,bkrh->bksh", probabilities, d_rows))
    return jnp.concatenate(d_query, axis=3), d_key.astype(key.dtype), d_value.astype(value.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)
