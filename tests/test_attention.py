"""Attention in chunks of queries against attention with an explicit mask: value and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.ops import attention_chunked as chunked
from jaxmoe.ops.attention import causal_attention
from jaxmoe.ops.attention_masked import attention, attention_mask
from tests.tolerances import bound

CASES = {
    "one block": (2, 48, None),
    "uneven last block": (2, 150, None),
    "longer blocks": (1, 600, None),
    "window within a block": (2, 150, 7),
    "window over blocks": (1, 300, 100),
}


def errors(length, batch, window, padded):
    """Relative L2 errors of the output and of the gradients of query, key and value."""
    rng = np.random.default_rng(length)
    B, T, N, K, H = batch, length, 4, 2, 16
    query, key, value, cotangent = (
        jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K, N)
    )
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    if padded:
        segments[:, -T // 5 :] = 0
        segments[0, : T // 7] = 0
    segments = jnp.asarray(segments)
    valid = (segments > 0)[..., None, None]

    def in_blocks(query, key, value):
        return causal_attention(query, key, value, segments, window)

    def masked(query, key, value):
        index = jnp.broadcast_to(jnp.arange(T), (B, T))
        return attention(query, key, value, attention_mask(index, index, segments, segments, window))

    @partial(jax.jit, static_argnums=0)
    def run(function, query, key, value):
        with jax.default_matmul_precision("highest"):
            # The results at padding are never read.
            out, pull = jax.vjp(lambda *args: jnp.where(valid, function(*args), 0), query, key, value)
            return out, pull(cotangent)

    pairs = zip(*(jax.tree.leaves(run(f, query, key, value)) for f in (in_blocks, masked)), strict=True)
    return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "packed and padded"])
@pytest.mark.parametrize("name", CASES)
def test_equals_masked_attention(name, padded):
    batch, length, window = CASES[name]
    assert max(errors(length, batch, window, padded)) <= bound("attention_fp32")


@pytest.mark.parametrize("window", [None, 100])
def test_long_rows_take_more_blocks(window, monkeypatch):
    monkeypatch.setattr(chunked, "LONGEST", 64)
    assert len(list(chunked._chunks(600, window))) == 10
    assert max(errors(600, 1, window, True)) <= bound("attention_fp32")


def test_the_comparison_sees_a_planted_fault(monkeypatch):
    original = chunked.attention_mask

    def sees_the_next_token(query_index, *rest):
        return original(query_index + 1, *rest)

    assert max(errors(150, 2, None, False)) <= bound("attention_fp32")
    monkeypatch.setattr(chunked, "attention_mask", sees_the_next_token)
    assert max(errors(150, 2, None, False)) > 1e-2


def test_padding_alone_stays_finite():
    """A sequence without tokens: values and gradients are finite, so that no NaN reaches other sequences' sums."""
    ones = jnp.ones((1, 70, 2, 8))
    value, pull = jax.vjp(lambda q, k, v: causal_attention(q, k, v, jnp.zeros((1, 70), jnp.int32)), ones, ones, ones)
    assert all(bool(jnp.isfinite(a).all()) for a in (value, *pull(ones)))


def test_needs_less_memory_than_masked_attention():
    shapes = [jax.ShapeDtypeStruct((1, 2048, heads, 16), jnp.float32) for heads in (4, 2, 2)]
    segments = jnp.ones((1, 2048), jnp.int32)

    def temporaries(function):
        loss = jax.jit(jax.grad(lambda *args: jnp.sum(function(*args)), argnums=(0, 1, 2)))
        analysis: Any = loss.lower(*shapes).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    index = jnp.arange(2048)[None]
    mask = attention_mask(index, index, segments, segments, None)
    in_blocks = temporaries(lambda q, k, v: causal_attention(q, k, v, segments))
    masked = temporaries(lambda q, k, v: attention(q, k, v, mask))
    assert in_blocks < masked / 2, (in_blocks, masked)
