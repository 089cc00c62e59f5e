"""Backward pass, in two programs that recompute the weights of attention from the log-sum (Dao et al. 2022).

One has a tile of queries and walks along the keys, for the gradient of the queries. The other has a tile of keys and
walks along the queries of all heads that share them, for the gradients of keys and values. Neither adds to what another
thread block writes, so the sums have one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxmoe.ops.kernels.ampere import copy, launch, pipelined, store
from jaxmoe.ops.kernels.flash.block import (
    Bounds,
    Shape,
    across,
    add_product,
    held,
    load,
    product_transposed,
    scratch,
    struct,
    zeros,
)
from jaxmoe.ops.kernels.flash.tiles import Tiles

Kept = tuple[tuple[Array, ...], ...]  # of each owned tile its parts in registers; none: it is in shared memory alone


class Saved(NamedTuple):
    """What the backward pass gets: operands, the log-sum and `delta`, the sum of out * d_out by head, and d_out."""

    query: Array
    key: Array
    value: Array
    log_sum: Array
    delta: Array
    d_out: Array

    def flat(self, shape: Shape) -> Saved:
        """The same with flat heads."""
        flat = {name: shape.flat(getattr(self, name)) for name in ("query", "key", "value", "d_out")}
        return self._replace(**flat)


def gradient_of_query(shape: Shape, tiles: Tiles, saved: Saved, low: Array, interpret: Any = None) -> Array:
    """The gradient [B, T, N, H]. `low` [B, T] is each query's first key."""
    dtype, rows = saved.query.dtype, tiles.rows

    def body(*refs: Any) -> None:
        data, (low, result, *owned, keys, values) = Saved(*refs[:6]), refs[6:]
        number, head, sequence = (lax.axis_index(axis) for axis in ("tile", "head", "sequence"))
        row = (shape.tokens // rows - 1 - number) * rows  # those with most keys first
        key_head = lax.div(head, jnp.int32(shape.group))
        place = shape.tile(sequence, row, rows, head)
        for source, target in zip((data.query, data.d_out), owned, strict=True):
            copy(source.at[place], target)
        part = pl.ds(row, rows)
        log_sum, delta = (load(ref.at[sequence, head, part], 0, dtype) for ref in (data.log_sum, data.delta))
        bounds = Bounds(load(low.at[sequence, part], 0, dtype), None, low[sequence, row + rows - 1], row)
        first = lax.div(low[sequence, row], jnp.int32(tiles.walked))
        end = lax.div(row + rows - 1, jnp.int32(tiles.walked)) + 1

        def start_copies(step: Array, slot: Array) -> None:
            place = shape.tile(sequence, (first + step) * tiles.walked, tiles.walked, key_head)
            copy(data.key.at[place], keys.at[slot])
            copy(data.value.at[place], values.at[slot])

        def step(number: Array, slot: Array, carry: tuple[Array, Kept]) -> tuple[Array, Kept]:
            sums, kept = carry
            own, own_d_out = _nearest(owned, kept)
            logits = product_transposed(own, keys.at[slot]) * shape.scale_base_2
            logits = bounds.mask(logits, row, (first + number) * tiles.walked, dtype)
            weights = jnp.exp2(logits - across(log_sum, logits.shape, 0))
            d_weights = product_transposed(own_d_out, values.at[slot])
            d_logits = weights * (d_weights - across(delta, logits.shape, 0))
            return add_product(sums, d_logits, keys.at[slot]), kept

        def init() -> tuple[Array, Kept]:
            return zeros(rows, shape.width, dtype), _keep(owned, tiles.held)

        sums, _ = pipelined(end - first, tiles.slots, 2, start_copies, step, init)
        store((sums * shape.scale).astype(dtype), result.at[place])

    operands = saved.flat(shape)
    out, memory = struct(operands.query.shape, dtype), scratch(tiles, 2, shape.width, dtype)
    grid = {"tile": shape.tokens // rows, "head": shape.heads, "sequence": shape.sequences}
    result = launch("flash_d_query", body, out, memory, grid, interpret)(*operands, low)
    return result.reshape(saved.query.shape)


def gradients_of_keys(
    shape: Shape, tiles: Tiles, saved: Saved, high: Array, interpret: Any = None
) -> tuple[Array, Array]:
    """The gradients of keys and values, [B, T, K, H]. `high` [B, T] is the last query that sees each key."""
    dtype, rows = saved.query.dtype, tiles.rows

    def body(*refs: Any) -> None:
        data, (high, d_key, d_value, *owned, queries, d_outs) = Saved(*refs[:6]), refs[6:]
        number, key_head, sequence = (lax.axis_index(axis) for axis in ("tile", "head", "sequence"))
        row = number * rows  # the first tiles have most queries
        own_place = shape.tile(sequence, row, rows, key_head)
        for source, target in zip((data.key, data.value), owned, strict=True):
            copy(source.at[own_place], target)
        bounds = Bounds(None, load(high.at[sequence, pl.ds(row, rows)], 0, dtype), row + rows - 1, high[sequence, row])
        first = lax.div(row, jnp.int32(tiles.walked))
        each = lax.div(high[sequence, row + rows - 1], jnp.int32(tiles.walked)) + 1 - first  # tiles of a head's queries

        def where(step: Array) -> tuple[Array, Array]:
            """Head and first row of a step: the tiles of one head, then those of the next."""
            return key_head * shape.group + lax.div(step, each), (first + lax.rem(step, each)) * tiles.walked

        def start_copies(step: Array, slot: Array) -> None:
            head, start = where(step)
            place = shape.tile(sequence, start, tiles.walked, head)
            copy(data.query.at[place], queries.at[slot])
            copy(data.d_out.at[place], d_outs.at[slot])

        def step(number: Array, slot: Array, carry: tuple[Array, Array, Kept]) -> tuple[Array, Array, Kept]:
            of_key, of_value, kept = carry
            own, own_value = _nearest(owned, kept)
            head, start = where(number)
            part = pl.ds(start, tiles.walked)
            log_sum, delta = (load(ref.at[sequence, head, part], 1, dtype) for ref in (data.log_sum, data.delta))
            logits = product_transposed(own, queries.at[slot]) * shape.scale_base_2  # [keys, queries]
            logits = bounds.mask(logits, row, start, dtype)
            weights = jnp.exp2(logits - across(log_sum, logits.shape, 1))
            of_value = add_product(of_value, weights, d_outs.at[slot])
            d_weights = product_transposed(own_value, d_outs.at[slot])
            d_logits = weights * (d_weights - across(delta, logits.shape, 1))
            return add_product(of_key, d_logits, queries.at[slot]), of_value, kept

        def init() -> tuple[Array, Array, Kept]:
            nothing = zeros(rows, shape.width, dtype)
            return nothing, nothing, _keep(owned, tiles.held)

        of_key, of_value, _ = pipelined(each * shape.group, tiles.slots, 2, start_copies, step, init)
        store((of_key * shape.scale).astype(dtype), d_key.at[own_place])
        store(of_value.astype(dtype), d_value.at[own_place])

    operands = saved.flat(shape)
    out, memory = struct(operands.key.shape, dtype), scratch(tiles, 2, shape.width, dtype)
    grid = {"tile": shape.tokens // rows, "head": shape.key_heads, "sequence": shape.sequences}
    found = launch("flash_d_keys", body, (out, out), memory, grid, interpret)(*operands, high)
    d_key, d_value = (array.reshape(saved.key.shape) for array in found)
    return d_key, d_value


def _keep(owned: Sequence[Any], count: int) -> Kept:
    """The last `count` of the owned tiles in registers."""
    first = len(owned) - count
    return tuple(held(tile) if number >= first else () for number, tile in enumerate(owned))


def _nearest(owned: Sequence[Any], kept: Kept) -> list[Any]:
    """Each owned tile: its parts in registers, or else its place in shared memory."""
    return [parts or tile for tile, parts in zip(owned, kept, strict=True)]
