"""The KV cache, and the forward pass that reads and writes it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.model.decoder import Context, captured_of_layers, run_decoder
from jaxmoe.model.interface import Options, Params
from jaxmoe.ops.attention import causal_attention
from jaxmoe.ops.cached_attention import CacheStacks, Heads, Rotation, cached_attention
from jaxmoe.ops.rotary import rotary_tables
from jaxmoe.ops.router import CapturedRouting, RoutingControl


class KVCache(NamedTuple):
    """Keys (after norm and rotation) and values of every layer; slot s holds the sequence's position s."""

    key: Float[Array, "L B S K H"]
    value: Float[Array, "L B S K H"]


class NewTokens(NamedTuple):
    """T new tokens per sequence, at positions start .. start + T - 1; the first `length` of them are real.

    Without `start` the sequences begin here, at position 0.
    """

    input_ids: Int[Array, "B T"]
    start: Int[Array, " B"] | None
    length: Int[Array, " B"]


def empty_cache(config: Qwen3MoeConfig, batch: int, slots: int, dtype: Any) -> KVCache:
    """A cache of zeros for `batch` sequences of up to `slots` positions."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def forward_cached(
    params: Params,
    adapters: Params,
    new: NewTokens,
    cache: KVCache,
    *,
    config: Qwen3MoeConfig,
    options: Options = Options(),  # noqa: B008 - frozen
    control: RoutingControl | None = None,
) -> tuple[Float[Array, "B T D"], KVCache, CapturedRouting | None]:
    """Runs the decoder over new tokens, which read and extend the cache: (hidden states, cache, captured routing).

    Sequences that begin here attend with `causal_attention`, and the cache is only written. Tokens after a sequence's
    end write to slots that no query reads until a later call has overwritten them. Positions must stay below the
    cache's S.
    """
    input_ids, start, length = new
    B, T = input_ids.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T)) if start is None else start[:, None] + jnp.arange(T)

    def whole_sequences(stack: Array, new: Array, layer: Array) -> Array:
        return jax.lax.dynamic_update_slice(
            stack, new[None, :, : stack.shape[2]].astype(stack.dtype), (layer, 0, 0, 0, 0)
        )

    def attend(query: Array, key: Array, value: Array, layer: Array, cache: KVCache) -> tuple[Array, KVCache]:
        # Padding comes after every real token, so causality alone excludes it.
        out = causal_attention(query, key, value, None, config.sliding_window)
        pairs = (cache.key, key), (cache.value, value)
        return out, KVCache(*(whole_sequences(*pair, layer) for pair in pairs))

    def attend_cached(new: Heads, rotation: Rotation, layer: Array, cache: KVCache) -> tuple[Array, KVCache]:
        stacks = CacheStacks(*cache)
        out, stacks = cached_attention(new, rotation, stacks, layer, positions, config.sliding_window)
        return out, KVCache(*stacks)

    tables = rotary_tables(positions, config.rope_parameters, config.head_dim)
    valid = (jnp.arange(T) < length[:, None]).reshape(-1)
    decoding = start is not None
    context = Context(config, options, tables, valid, attend_cached if decoding else attend, control, decoding=decoding)
    hidden, cache, records, _ = run_decoder(params, adapters, input_ids, context, cache)
    return hidden, cache, captured_of_layers(records, config, input_ids.shape)
