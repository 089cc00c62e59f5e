"""Attention of one new token per sequence over the KV cache, from the projections to the heads' outputs in one launch.

A Pallas kernel in Mosaic GPU, for any NVIDIA GPU from compute capability 8.0 on. A thread block handles a sequence,
some query heads of one key/value head, and a part of the slots. It normalises and rotates the new queries and key, and
writes the new key and value to the cache in place. Of the cache it reads only chunks of slots that are filled and
inside the window. Each group of threads that reads a row has a maximum, a sum and weighted values of its own; they are
joined at the end, and then those of the parts (Dao et al. 2023, flash decoding). On an H200 text
takes longer with it than with the Triton kernel (docs/log), so it is selected by name only.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from jaxmoe.ops import small_case
from jaxmoe.ops.cached_attention import MASKED, CacheStacks, Heads, Rotation
from jaxmoe.ops.kernels import ampere, row_tiles
from jaxmoe.ops.kernels.row_tiles import across, load, rows_of
from jaxmoe.ops.norm import StackedNorm

_HALVES = (32, 64, 128)  # columns of half a head
_CHUNK = 64  # slots that are read at a time, at most
_HEADS = 4  # query heads of a thread block, one for each warp when they are joined
_PART, _MOST_PARTS = 512, 32  # slots of a thread block, at least; parts of a sequence, at most
_LEAST = -1e30  # below any logit


def unsupported(query: Any, key: Any) -> str | None:
    """Why the kernel cannot run for queries [B, T, N, H] over a cache [L, B, S, K, H]; None if it can."""
    _, T, _, H = query.shape
    S = key.shape[2]
    if T != 1:
        return f"needs one new token per sequence, found {T}"
    if (why := ampere.unsupported(query.dtype)) is not None:
        return why
    if key.dtype != query.dtype:
        return f"needs queries and keys of one dtype, found {query.dtype.name} and {key.dtype.name}"
    if H // 2 not in _HALVES or H % 2:
        return f"needs heads of 64, 128 or 256 columns, found {H}"
    if S & (S - 1) or rows_of(H // 2) > S:
        return f"needs a power of two of slots, at least {rows_of(H // 2)}, found {S}"
    return None


def attend(
    new: Heads,
    rotation: Rotation,
    cache: CacheStacks,
    layer: Int[Array, ""],
    at: Int[Array, "B 1"],
    sliding_window: int | None,
    interpret: Any = None,
) -> tuple[Float[Array, "B 1 N H"], CacheStacks]:
    """As `jaxmoe.ops.cached_attention`, for one token per sequence; `interpret`: parameters of JAX's interpreter."""
    B, _, N, H = new.query.shape
    _, _, S, K, _ = cache.key.shape
    G, half, dtype = N // K, H // 2, new.query.dtype
    rows = rows_of(half)
    blocks = -(-G // _HEADS)  # thread blocks of a group of query heads; the last may do a head several times
    parts = max(1, min(S // _PART, _MOST_PARTS))
    length = S // parts
    chunk = max(rows, min(_CHUNK, length))
    tile = (rows, half)

    def rotated(x: list[Array], norm: list[Array], turn: list[Array], eps: float) -> list[Array]:
        """Both halves of a head, normalised and rotated in float32 and rounded once; all rows of the tiles are it."""
        first, second = (across(each.astype(jnp.float32), tile, 1) for each in x)
        total = jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)
        scale = across(lax.rsqrt(total / H + eps), tile, 0)
        first, second = (each * scale * across(own, tile, 1) for each, own in zip((first, second), norm, strict=True))
        cos, sin = (across(each, tile, 1) for each in turn)
        return [(first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)]

    def body(*refs: Any) -> None:
        (layer_ref, position_ref, *places), inputs, (keys, values) = refs[:4], refs[4:11], refs[11:13]
        *results, tops, totals, sums, new_key = refs[13:]
        query, key, value, query_norm, key_norm, cos_ref, sin_ref = inputs
        sequence, heads, part = (lax.axis_index(name) for name in ("sequence", "heads", "part"))
        head, block = lax.div(heads, jnp.int32(blocks)), lax.rem(heads, jnp.int32(blocks))
        layer, position = layer_ref[0], position_ref[sequence]
        halves = [pl.ds(0, half), pl.ds(half, half)]
        one = lambda ref, *index: [load(ref.at[(*index, columns)], half, 1) for columns in halves]
        norms = [
            [each.astype(jnp.float32) for each in one(ref, place[0])]
            for ref, place in zip((query_norm, key_norm), places, strict=True)
        ]
        turn = [load(ref.at[sequence], half, 1) for ref in (cos_ref, sin_ref)]
        queries = [head * G + jnp.minimum(block * _HEADS + n, G - 1) for n in range(_HEADS)]
        q = [rotated(one(query, sequence, own), norms[0], turn, rotation.query.eps) for own in queries]
        k = rotated(one(key, sequence, head), norms[1], turn, rotation.key.eps)
        v = one(value, sequence, head)
        first_slot = jnp.int32(0) if sliding_window is None else jnp.maximum(position - (sliding_window - 1), 0)
        begin = jnp.maximum(part * length, lax.div(first_slot, jnp.int32(chunk)) * chunk)
        end = jnp.minimum((part + 1) * length, position)  # the new token's own slot is not read
        row = row_tiles.plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=row_tiles.layout(half).reduce(1))

        def product(a: list[Array], b: list[Array]) -> Array:
            """Of the rows of two tiles, in halves."""
            pairs = (x.astype(jnp.float32) * y.astype(jnp.float32) for x, y in zip(a, b, strict=True))
            return jnp.sum(sum(pairs), axis=1) * H**-0.5

        def read(ref: Any, start: Array) -> list[Array]:
            return [load(ref.at[layer, sequence, pl.ds(start, rows), head, columns], half) for columns in halves]

        def step(number: Array, state: Any) -> Any:
            starts = [begin + number * chunk + n for n in range(0, chunk, rows)]
            both = [[read(ref, start) for start in starts] for ref in (keys, values)]
            seen = [((row + start) >= first_slot) & ((row + start) < end) for start in starts]
            following = []
            for own, (most, total, acc) in zip(q, state, strict=True):
                logits = [jnp.where(s, product(own, each), -jnp.inf) for s, each in zip(seen, both[0], strict=True)]
                higher = most
                for each in logits:
                    higher = jnp.maximum(higher, each)
                shrunk = jnp.exp(most - higher)
                weights = [jnp.exp(each - higher) for each in logits]
                total = total * shrunk + sum(weights)
                acc = [each * across(shrunk, tile, 0) for each in acc]
                for weight, each in zip(weights, both[1], strict=True):
                    wide = across(weight, tile, 0)
                    acc = [old + wide * part.astype(jnp.float32) for old, part in zip(acc, each, strict=True)]
                following.append((higher, total, acc))
            return following

        # The first row of the first part begins with the new token itself, the others with a maximum below any logit.
        is_first = part == 0
        own = row == jnp.where(is_first, jnp.int32(0), jnp.int32(-1))
        started = jnp.where(own, 1.0, 0.0)
        wide = across(started, tile, 0)
        acc = [across(each.astype(jnp.float32), tile, 1) * wide for each in v]
        state = [(jnp.where(own, product(each, k), _LEAST), started, acc) for each in q]
        state = lax.fori_loop(0, lax.div(jnp.maximum(end - begin, 0) + (chunk - 1), jnp.int32(chunk)), step, state)

        for n, (most, total, acc) in enumerate(state):
            ampere.store(most, tops.at[n])
            ampere.store(total, totals.at[n])
            for m, each in enumerate(acc):
                ampere.store(each, sums.at[n, m])
        for m, each in enumerate(k):
            ampere.store(each, new_key.at[m])
        if interpret is None:
            _barrier()

        @pl.when(is_first & (position < S) & (block == 0))
        def _() -> None:
            for n, columns in enumerate(halves):
                place = layer, sequence, position, head, columns
                ampere.store(load(new_key.at[n, 0], half, 1), keys.at[place])
                ampere.store(v[n], values.at[place])

        def of_heads(ref: Any, n: int) -> Array:
            """What this row of the tiles has for each head."""
            return row_tiles.plgpu.load(ref.at[:, n], layout=_joining(half).reduce(1), optimized=False)

        most = [of_heads(tops, n) for n in range(rows)]
        top = most[0]
        for each in most[1:]:
            top = jnp.maximum(top, each)
        shrunk = [jnp.exp(each - top) for each in most]
        total: Any = sum(of_heads(totals, n) * each for n, each in enumerate(shrunk))
        wide = lambda each: row_tiles.plgpu.layout_cast(
            lax.broadcast_in_dim(each, (_HEADS, half), (0,)), _joining(half)
        )
        own_heads = pl.ds(block * _HEADS, _HEADS)
        for m, columns in enumerate(halves):
            acc: Any = sum(
                row_tiles.plgpu.load(sums.at[:, m, n], layout=_joining(half), optimized=False) * wide(each)
                for n, each in enumerate(shrunk)
            )
            if parts == 1:
                acc = (acc / wide(total)).astype(dtype)
                ampere.store(acc, results[0].at[sequence, head, own_heads, columns])
            else:
                ampere.store(acc, results[0].at[sequence, head, part, own_heads, columns])
        if parts > 1:
            for result, each in zip(results[1:], (top, total), strict=True):
                ampere.store(each, result.at[sequence, head, part, own_heads])

    padded = blocks * _HEADS
    outs = [jax.ShapeDtypeStruct((B, K, padded, H), dtype)]
    if parts > 1:
        by_part = (B, K, parts, padded)
        outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*by_part, H), by_part, by_part)]
    shared = row_tiles.plgpu.SMEM
    scratch = [shared((_HEADS, rows), jnp.float32)] * 2
    scratch += [shared((_HEADS, 2, rows, half), jnp.float32), shared((2, rows, half), dtype)]
    grid = {"heads": K * blocks, "part": parts, "sequence": B}
    norms = rotation[:2]
    numbers = [jnp.asarray(number, jnp.int32).reshape(-1) for number in (layer, at, *(norm.place for norm in norms))]
    single, tables = [array[:, 0] for array in new], [table[:, 0] for table in rotation.tables]
    stacks = [jax.new_ref(stack) for stack in cache]
    kernel = ampere.launch("cached_attention", body, outs, scratch, grid, interpret)
    results = kernel(*numbers, *single, *(norm.stack for norm in norms), *tables, *stacks)
    heads = results[0] if parts == 1 else _joined(*results).astype(dtype)
    return heads[:, :, :G].reshape(B, 1, N, H), CacheStacks(*(jax.freeze(stack) for stack in stacks))


def _joining(half: int) -> Any:
    """How a tile [_HEADS, half] lies in registers: a head for each warp."""
    vector = half // 32
    tiling = row_tiles.plgpu.Tiling(((_HEADS, half), (vector,)))
    return row_tiles.plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _barrier() -> None:
    """What was written to shared memory can be read by all threads."""

    @row_tiles.plgpu.inline_mgpu()
    def wait(_: Any) -> None:
        from jax.experimental.mosaic.gpu import utils

        utils.warpgroup_barrier()

    wait()


def _joined(
    sums: Float[Array, "B K parts heads H"], maxima: Float[Array, "B K parts heads"], totals: Array
) -> Float[Array, "B K heads H"]:
    """The heads' outputs from the parts' weighted sums of values, their largest logits, and their sums of weights."""
    shrunk = jnp.exp(maxima - jnp.max(maxima, axis=2, keepdims=True))
    return jnp.sum(sums * shrunk[..., None], axis=2) / jnp.sum(totals * shrunk, axis=2)[..., None]


class Flash:
    """The implementation "mosaic" of attention over the cache."""

    def unsupported(self, query: Any, key: Any) -> str | None:
        """Why it cannot run for queries [B, T, N, H] over a cache [L, B, S, K, H], or None; on a GPU it first runs a
        small case."""
        if (why := unsupported(query, key)) is not None or jax.default_backend() != "gpu":
            return why
        return _small_case(query.shape[-1], query.dtype.name)

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


@cache
def _small_case(width: int, dtype: str) -> str | None:
    return small_case.why_not(partial(small_case_error, width, dtype), f"a small cache of {width} columns")


def small_case_error(width: int, dtype: str, interpret: Any = None) -> float:
    """The relative error of attention over a cache of heads of this width, and of what is written to it."""
    keys, (B, S, N, K) = iter(jax.random.split(jax.random.key(0), 7)), (2, 128, 10, 2)
    normal = lambda *shape: jax.random.normal(next(keys), shape).astype(dtype)
    new = Heads(normal(B, 1, N, width), normal(B, 1, K, width), normal(B, 1, K, width))
    cache = CacheStacks(normal(2, B, S, K, width), normal(2, B, S, K, width))
    norms = [StackedNorm(1 + normal(2, width) / 4, 1, 1e-6) for _ in range(2)]
    at = jnp.asarray([[100], [7]], jnp.int32)
    angles = 0.01 * at[..., None] * jnp.arange(width // 2)

    @jax.jit
    def error(new: Heads, cache: CacheStacks) -> Array:
        rotation = Rotation(*norms, tables=(jnp.cos(angles), jnp.sin(angles)))
        arguments = new, rotation, cache, jnp.int32(1), at
        found, exact = attend(*arguments, None, interpret), MASKED(*arguments, None)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        return jnp.max(jnp.stack([small_case.relative_error(*pair) for pair in pairs]))

    return float(error(new, cache))


FLASH = Flash()
