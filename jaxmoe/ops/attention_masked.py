"""Attention with a mask for every pair of tokens: the oracle of `causal_attention`, also used for decoding."""

from __future__ import annotations

import jax
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
    query_index: Int[Array, "B T"],
    key_index: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    sliding_window: int | None,
) -> Bool[Array, "B T S"]:
    """Which key each query sees: not later, in the same segment (0 is padding, seen by none), inside the window.

    A window of w admits the last w positions, the query's own included, as transformers' sliding mask does.
    """
    distance = query_index[:, :, None] - key_index[:, None, :]
    mask = (distance >= 0) & (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments > 0)[:, None, :]
    return mask if sliding_window is None else mask & (distance < sliding_window)


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Grouped-query attention softmax(q k^T / sqrt(H)) v with float32 logits and softmax.

    A query that sees no key (padding) gets the mean of the values: finite, and never read.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], scale=query.shape[-1] ** -0.5)
