"""Causal attention over sequences that the devices of the `context` axis share.

Each device has the queries of its own tokens (`jaxmoe.distributed.chunks`) and gathers the keys and values of all:
with a few key/value heads they are much smaller than the queries, which stay where they are.

Chunks are cut into tiles. A tile of queries meets the tiles of keys one after the other, from the first that the window
reaches to its own, with a running softmax (Dao et al. 2022, algorithm 1). Without a window every device meets the same
number of pairs. The backward pass recomputes each pair's probabilities from the saved log-sum-exp. It runs anywhere and
in any dtype; its oracle is `jaxmoe.ops.attention_masked`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.distributed import chunks
from jaxmoe.ops.attention_masked import attention_mask
from jaxmoe.ops.contraction import product
from jaxmoe.ops.kept import ATTENTION_LOG_SUM, ATTENTION_OUT

_MASKED = -1e30  # finite, so that a query that sees nothing gets a mean and not a NaN
LONGEST = 512  # tokens of a tile


class _Layout(NamedTuple):
    """How a sequence is cut: into chunks of `chunk` tokens, each into `tiles` of `tile` tokens, the last one padded."""

    chunk: int
    tiles: int
    tile: int

    @classmethod
    def of(cls, chunk: int) -> _Layout:
        tiles = -(-chunk // LONGEST)
        return cls(chunk, tiles, -(-chunk // tiles))

    def cut(self, array: Array) -> Array:
        """[B, tokens of whole chunks, ...] -> [tiles, B, tile, ...], padded with zeros."""
        chunked = array.reshape(array.shape[0], -1, self.chunk, *array.shape[2:])
        missing = self.tiles * self.tile - self.chunk
        padded = jnp.pad(chunked, [(0, missing if axis == 2 else 0) for axis in range(chunked.ndim)])
        return jnp.moveaxis(padded.reshape(array.shape[0], -1, self.tile, *array.shape[2:]), 1, 0)

    def joined(self, tiles: Array) -> Array:
        """The inverse of `cut`."""
        ordered = jnp.moveaxis(tiles, 0, 1)
        chunked = ordered.reshape(ordered.shape[0], -1, self.tiles * self.tile, *ordered.shape[3:])
        return chunked[:, :, : self.chunk].reshape(ordered.shape[0], -1, *ordered.shape[3:])

    def places(self, number: Array) -> Int[Array, " tile"]:
        """The places in the sequence of a tile's tokens."""
        return number // self.tiles * self.chunk + number % self.tiles * self.tile + jnp.arange(self.tile)

    def first_seen(self, number: Array, window: int | None) -> Array:
        """The first tile of keys that some query of a tile sees."""
        if window is None:
            return jnp.zeros_like(number)
        place = jnp.maximum(self.places(number)[0] - window + 1, 0)
        return place // self.chunk * self.tiles + place % self.chunk // self.tile


class _Sequences(NamedTuple):
    """The keys' side of attention: tiles of whole sequences, in their order."""

    key: Float[Array, "tiles B K t H"]
    value: Float[Array, "tiles B K t H"]
    segments: Int[Array, "tiles B t"]  # 0: padding


def context_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B S"] | None,
    window: int | None,
    devices: int,
) -> Float[Array, "B T N H"]:
    """As `jaxmoe.ops.attention.causal_attention`, for this device's T of S tokens; `segments` are those of all."""
    B, T, N, H = query.shape
    K = key.shape[2]
    layout = _Layout.of(T // 2)
    if segments is None:
        segments = jnp.ones((B, T * devices), jnp.int32)
    keys, values = (chunks.gather_chunks(layout.cut(share).swapaxes(2, 3), devices) for share in (key, value))
    sequences = _Sequences(keys, values, layout.cut(segments))
    first, second = chunks.own(devices)
    numbers = jnp.stack([first, second])[:, None] * layout.tiles + jnp.arange(layout.tiles)
    tiles = layout.cut(query.reshape(B, T, K, N // K, H)).transpose(0, 1, 3, 4, 2, 5)
    out: Array = _attend(tiles, sequences, numbers.reshape(-1), layout, window)
    return layout.joined(out.transpose(0, 1, 4, 2, 3, 5)).reshape(B, T, N, H)


def _rows(heads: Array) -> Array:
    """[B, K, G, t, x] -> [B, K, G * t, x], a group's query heads one after the other."""
    B, K, *_, width = heads.shape
    return heads.reshape(B, K, -1, width)


def _logits(
    query: Array, number: Array, sequences: _Sequences, other: Array, layout: _Layout, window: int | None
) -> Array:
    """Masked logits [B, K, G * t, t] of the query tile `number` and the key tile `other`, float32."""
    own, keys = sequences.segments[number], sequences.segments[other]
    places, seen = (jnp.broadcast_to(layout.places(each), own.shape) for each in (number, other))
    mask = jnp.tile(attention_mask(places, seen, own, keys, window), (1, query.shape[2], 1))[:, None]
    logits = product("bkrh,bksh->bkrs", _rows(query), sequences.key[other]) * query.shape[-1] ** -0.5
    return jnp.where(mask, logits, _MASKED)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    query: Array, sequences: _Sequences, numbers: Array, layout: _Layout, window: int | None
) -> Float[Array, "own B K G t H"]:
    """The output of the tiles `numbers` of queries [own, B, K, G, t, H]."""
    return _attend_forward(query, sequences, numbers, layout, window)[0]


def _attend_forward(query: Array, sequences: _Sequences, numbers: Array, layout: _Layout, window: int | None):
    def of_tile(arguments: tuple[Array, Array]) -> tuple[Array, Array]:
        query, number = arguments

        def meet(other: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, largest, total = state
            logits = _logits(query, number, sequences, other, layout, window)
            now = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
            weights, shrink = jnp.exp(logits - now), jnp.exp(largest - now)
            value = sequences.value[other]
            out = out * shrink + product("bkrs,bksh->bkrh", weights.astype(value.dtype), value)
            return out, now, total * shrink + jnp.sum(weights, axis=-1, keepdims=True)

        out = jnp.zeros(_rows(query).shape, jnp.float32)
        nothing = out, jnp.full_like(out[..., :1], _MASKED), jnp.zeros_like(out[..., :1])
        out, largest, total = jax.lax.fori_loop(layout.first_seen(number, window), number + 1, meet, nothing)
        return (out / total).astype(query.dtype).reshape(query.shape), largest + jnp.log(total)

    out, log_sum = jax.lax.map(of_tile, (query, numbers))
    out, log_sum = checkpoint_name(out, ATTENTION_OUT), checkpoint_name(log_sum, ATTENTION_LOG_SUM)
    return out, (query, sequences, numbers, out, log_sum)


def _attend_backward(layout: _Layout, window: int | None, residuals: tuple[Any, ...], d_out: Array):
    query, sequences, numbers, out, log_sum = residuals
    scale = query.shape[-1] ** -0.5
    dtype = query.dtype

    def of_tile(d_sequences: tuple[Array, Array], arguments: tuple[Array, ...]):
        query, number, log_sum, out, d_out = arguments
        d_out = _rows(d_out)
        # sum_s p_s dp_s, the part of the softmax's derivative that all logits of a query share
        shared = jnp.sum(d_out.astype(jnp.float32) * _rows(out).astype(jnp.float32), axis=-1, keepdims=True)

        def meet(other: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_query, d_key, d_value = state
            probabilities = jnp.exp(_logits(query, number, sequences, other, layout, window) - log_sum)
            d_probabilities = product("bkrh,bksh->bkrs", d_out, sequences.value[other])
            d_logits = (probabilities * (d_probabilities - shared) * scale).astype(dtype)
            d_query += product("bkrs,bksh->bkrh", d_logits, sequences.key[other])
            d_key = d_key.at[other].add(product("bkrs,bkrh->bksh", d_logits, _rows(query)))
            d_value = d_value.at[other].add(product("bkrs,bkrh->bksh", probabilities.astype(dtype), d_out))
            return d_query, d_key, d_value

        first = layout.first_seen(number, window)
        nothing = jnp.zeros(_rows(query).shape, jnp.float32), *d_sequences
        d_query, d_key, d_value = jax.lax.fori_loop(first, number + 1, meet, nothing)
        return (d_key, d_value), d_query.astype(dtype).reshape(query.shape)

    zeros: Any = [jnp.zeros(array.shape, jnp.float32) for array in (sequences.key, sequences.value)]
    d_sequences, d_query = jax.lax.scan(of_tile, tuple(zeros), (query, numbers, log_sum, out, d_out))
    d_key, d_value = (array.astype(dtype) for array in d_sequences)
    no_gradient: Any = None
    return d_query, _Sequences(d_key, d_value, no_gradient), None


_attend.defvjp(_attend_forward, _attend_backward)


class Tiles:
    """The implementation "tiles" of attention over sequences that devices share."""

    def unsupported(self, *operands: Any) -> None:
        """It runs anywhere."""

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segments: Int[Array, "B S"] | None,
        window: int | None,
        devices: int,
    ) -> Float[Array, "B T N H"]:
        """As the function `context_attention`."""
        return context_attention(query, key, value, segments, window, devices)


TILES = Tiles()
