"""Attention of one new token per sequence over the KV cache, from the projections to the heads' outputs in one launch.

A Pallas kernel in Triton, for any NVIDIA GPU. A program handles a sequence, a key/value head with its group of query
heads, and a part of the slots. It normalises and rotates the new queries and key, and writes the new key and value to
the cache in place. Of the cache it reads only chunks of slots that are filled and inside the window. Parts are joined
by their maxima and sums (Dao et al. 2023, flash decoding).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxmoe.ops.cached_attention import CacheStacks, Heads, Rotation

_HEADS = 16  # rows of a product on the tensor cores; a group with fewer query heads is padded
_CHUNK = 128  # slots that are read at a time, at most
_PART, _MOST_PARTS = 512, 32  # slots that one program is responsible for, at least; programs of one head, at most


def unsupported(query: Any, key: Any) -> str | None:
    """Why the kernel cannot run for queries [B, T, N, H] over a cache [L, B, S, K, H]; None if it can."""
    _, T, N, H = query.shape
    _, _, S, K, _ = key.shape
    if T != 1:
        return f"needs one new token per sequence, found {T}"
    if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
        return f"needs bfloat16 or float16, found {query.dtype.name} and {key.dtype.name}"
    if H & (H - 1) or not 32 <= H <= 256:
        return f"needs heads of 32, 64, 128 or 256 columns, found {H}"
    if N // K > _HEADS:
        return f"needs at most {_HEADS} query heads for a key head, found {N // K}"
    if S & (S - 1) or S < 16:
        return f"needs a power of two of slots, at least 16, found {S}"
    return None


def attend(
    new: Heads,
    rotation: Rotation,
    cache: CacheStacks,
    layer: Int[Array, ""],
    at: Int[Array, "B 1"],
    sliding_window: int | None,
    interpret: bool = False,
) -> tuple[Float[Array, "B 1 N H"], CacheStacks]:
    """As `jaxmoe.ops.cached_attention`, for one token per sequence."""
    B, _, N, H = new.query.shape
    _, _, S, K, _ = cache.key.shape
    G, half, dtype = N // K, H // 2, new.query.dtype
    parts = max(1, min(S // _PART, _MOST_PARTS))
    length, chunk = S // parts, min(_CHUNK, S // parts)

    def body(*refs: Any) -> None:
        numbers, inputs, (keys_out, values_out, *results) = refs[:4], refs[4:13], refs[13:]
        query, key, value, query_norm, key_norm, cos_ref, sin_ref, keys, values = inputs
        (layer_ref, position_ref), norm_places = numbers[:2], numbers[2:]
        sequence, head, part = (pl.program_id(axis) for axis in range(3))
        layer, position = layer_ref[0], position_ref[sequence]
        column, group = jnp.arange(half), jnp.arange(_HEADS)
        own = group < G
        rows = head * G + jnp.minimum(group, G - 1)
        cos, sin = cos_ref[sequence, column], sin_ref[sequence, column]

        def rotated(first: Array, second: Array, norm: Any, place: Any, eps: float) -> tuple[Array, Array]:
            """Both halves of heads, normalised and rotated in float32 and rounded once."""
            first, second = first.astype(jnp.float32), second.astype(jnp.float32)
            mean = (jnp.sum(first * first, axis=-1) + jnp.sum(second * second, axis=-1)) / H
            scale = jax.lax.rsqrt(mean + eps)[..., None]
            first = first * scale * norm[place[0], column].astype(jnp.float32)
            second = second * scale * norm[place[0], half + column].astype(jnp.float32)
            return (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)

        at = lambda ref, row: (ref[sequence, row, column], ref[sequence, row, half + column])
        q = rotated(
            query[sequence, rows[:, None], column[None, :]],
            query[sequence, rows[:, None], half + column[None, :]],
            query_norm,
            norm_places[0],
            rotation.query.eps,
        )
        first, second = at(key, head)
        k = [each[0] for each in rotated(first[None], second[None], key_norm, norm_places[1], rotation.key.eps)]
        v = at(value, head)
        first_slot = 0 if sliding_window is None else jnp.maximum(position - (sliding_window - 1), 0)
        begin = jnp.maximum(part * length, first_slot // chunk * chunk)
        end = jnp.minimum((part + 1) * length, position)  # the new token's own slot is not read

        def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
            start, most, total, *acc = state
            slot = start + jnp.arange(chunk)
            seen = (slot >= first_slot) & (slot < end)

            def halves(ref: Any) -> list[Array]:
                places = [(layer, sequence, slot[:, None], head, (n * half + column)[None, :]) for n in range(2)]
                return [triton.load(ref.at[place], mask=seen[:, None], other=0.0) for place in places]

            pairs = zip(q, halves(keys), strict=True)
            logits = sum(jnp.dot(a, b.T, preferred_element_type=jnp.float32) for a, b in pairs) * H**-0.5
            logits = jnp.where(seen[None, :], logits, -jnp.inf)
            higher = jnp.maximum(most, jnp.max(logits, axis=1))
            shrunk = jnp.exp(most - higher)
            weights = jnp.exp(logits - higher[:, None])
            total = total * shrunk + jnp.sum(weights, axis=1)
            weights = weights.astype(dtype)
            added = [jnp.dot(weights, each, preferred_element_type=jnp.float32) for each in halves(values)]
            acc = [old * shrunk[:, None] + new for old, new in zip(acc, added, strict=True)]
            return start + chunk, higher, total, *acc

        # The first part begins with the new token itself, the others with a maximum below any logit.
        is_first = part == 0
        dots = [
            jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32)[None, :], axis=1) for a, b in zip(q, k, strict=True)
        ]
        logit = (dots[0] + dots[1]) * H**-0.5
        most = jnp.where(is_first, logit, -1e30)
        total = jnp.where(is_first, jnp.ones_like(logit), 0)
        acc = [jnp.where(is_first, jnp.broadcast_to(each.astype(jnp.float32)[None], (_HEADS, half)), 0) for each in v]
        _end, most, total, *acc = jax.lax.while_loop(lambda state: state[0] < end, step, (begin, most, total, *acc))

        @pl.when(is_first & (position < S))
        def _() -> None:
            for n in range(2):
                keys_out[layer, sequence, position, head, n * half + column] = k[n]
                values_out[layer, sequence, position, head, n * half + column] = v[n].astype(dtype)

        for n in range(2):
            columns = (n * half + column)[None, :]
            if parts == 1:
                # Places of nothing are different from each other: the interpreter writes what is masked back.
                where = results[0].at[sequence, jnp.where(own, rows, N + group)[:, None], columns]
                triton.store(where, (acc[n] / total[:, None]).astype(dtype), mask=own[:, None])
            else:
                results[0][sequence, head, part, group[:, None], columns] = acc[n]
        if parts > 1:
            results[1][sequence, head, part, group], results[2][sequence, head, part, group] = most, total

    by_part = (B, K, parts, _HEADS)
    outs = [jax.ShapeDtypeStruct((B, N, H), dtype)]
    if parts > 1:
        outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*by_part, H), by_part, by_part)]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kernel = pl.pallas_call(
        body,
        grid=(B, K, parts),
        out_shape=[*(jax.ShapeDtypeStruct(stack.shape, stack.dtype) for stack in cache), *outs],
        in_specs=[anywhere] * 13,
        out_specs=[anywhere] * (2 + len(outs)),
        input_output_aliases={11: 0, 12: 1},
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=interpret,
        name="cached_attention",
    )
    norms = rotation[:2]
    numbers = [jnp.asarray(number, jnp.int32).reshape(-1) for number in (layer, at, *(norm.place for norm in norms))]
    rows, tables = [array[:, 0] for array in new], [table[:, 0] for table in rotation.tables]
    keys, values, *results = kernel(*numbers, *rows, *(norm.stack for norm in norms), *tables, *cache)
    heads = results[0] if parts == 1 else _joined(*results)[:, :, :G].reshape(B, N, H).astype(dtype)
    return heads[:, None], CacheStacks(keys, values)


def _joined(
    sums: Float[Array, "B K parts heads H"], maxima: Float[Array, "B K parts heads"], totals: Array
) -> Float[Array, "B K heads H"]:
    """The heads' outputs from the parts' weighted sums of values, their largest logits, and their sums of weights."""
    shrunk = jnp.exp(maxima - jnp.max(maxima, axis=2, keepdims=True))
    return jnp.sum(sums * shrunk[..., None], axis=2) / jnp.sum(totals * shrunk, axis=2)[..., None]


class Flash:
    """The implementation "triton" of attention over the cache."""

    def unsupported(self, query: Any, key: Any) -> str | None:
        """Why it cannot run for queries [B, T, N, H] over a cache [L, B, S, K, H], or None."""
        return unsupported(query, key)

    def __call__(
        self,
        new: Heads,
        rotation: Rotation,
        cache: CacheStacks,
        layer: Array,
        at: Array,
        sliding_window: int | None,
    ) -> tuple[Array, CacheStacks]:
        """As `jaxmoe.ops.cached_attention.cached_attention`."""
        return attend(new, rotation, cache, layer, at, sliding_window)


FLASH = Flash()
