"""Attention of new tokens over the KV cache, which they are written to first."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.attention_masked import attention, attention_mask
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.norm import StackedNorm
from jaxmoe.ops.norm_rotary import norm_and_rotate


class Heads(NamedTuple):
    """Queries, keys and values of T new tokens per sequence, as they are projected."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T K H"]
    value: Float[Array, "B T K H"]


class CacheStacks(NamedTuple):
    """The keys and values of all layers; slot s holds the sequence's position s."""

    key: Float[Array, "L B S K H"]
    value: Float[Array, "L B S K H"]


class Rotation(NamedTuple):
    """What is done to queries and keys by head: a norm each, then rotation by the positions' cosine and sine."""

    query: StackedNorm
    key: StackedNorm
    tables: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]


def cached_attention(
    new: Heads, rotation: Rotation, cache: CacheStacks, layer: Any, at: Int[Array, "B T"], sliding_window: int | None
) -> tuple[Float[Array, "B T N H"], CacheStacks]:
    """Normalises and rotates queries and keys, writes the new keys and values to their positions, and attends to all
    positions up to each query's own.

    A position past the end of the cache is not written: it belongs to padding. With a window of w a query sees the
    last w positions, its own included. There is no backward pass.

    Args:
        new: what is projected of the new tokens.
        rotation: norms and rotation of queries and keys, in float32, rounded once.
        cache: the keys and values of all layers.
        layer: whose part of the cache it is.
        at: the new tokens' positions.
        sliding_window: the window, if there is one.
    """
    run = choose("cached_attention", new.query, cache.key).value
    return run(new, rotation, cache, jnp.asarray(layer, jnp.int32), at, sliding_window)


class Masked:
    """The implementation "xla": every query against every slot, under a mask."""

    def unsupported(self, query: Any, key: Any) -> str | None:
        """None: it runs anywhere."""
        return None

    def __call__(
        self,
        new: Heads,
        rotation: Rotation,
        cache: CacheStacks,
        layer: Array,
        at: Array,
        sliding_window: int | None,
    ) -> tuple[Array, CacheStacks]:
        """As `cached_attention`."""
        norms = zip((new.query, new.key), rotation[:2], strict=True)
        query, key = (norm_and_rotate(x, norm.weight, norm.eps, True, rotation.tables) for x, norm in norms)
        B, T = at.shape
        S = cache.key.shape[2]
        ones = partial(jnp.ones, dtype=jnp.int32)
        slots = jnp.broadcast_to(jnp.arange(S), (B, S))
        # One segment: a slot after the sequence's own position is excluded by causality alone.
        mask = attention_mask(at, slots, ones((B, T)), ones((B, S)), sliding_window)
        sequences = jnp.arange(B)[:, None]

        def written(stack: Array, rows: Array) -> Array:
            # Out-of-range writes (a bucket's padding past S) are dropped, never clamped onto the last slot.
            return stack.at[layer, sequences, at].set(rows.astype(stack.dtype), mode="drop")

        cache = CacheStacks(written(cache.key, key), written(cache.value, new.value))
        keys, values = (jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in cache)
        return attention(query, keys, values, mask), cache


MASKED = Masked()
