"""Forward pass: each thread block has one tile of queries of one head and walks along the keys that they see."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxmoe.ops.kernels.ampere import copy, launch, pipelined, store
from jaxmoe.ops.kernels.flash.block import (
    MASKED,
    Bounds,
    Shape,
    across,
    add_product,
    by_row,
    load,
    product_transposed,
    scratch,
    struct,
    zeros,
)
from jaxmoe.ops.kernels.flash.tiles import Tiles


def forward(
    shape: Shape, tiles: Tiles, query: Array, key: Array, value: Array, low: Array, interpret: Any = None
) -> tuple[Array, Array]:
    """(output [B, T, N, H], log2 of the sum of powers of two [B, N, T]). `low` [B, T] is each query's first key."""
    dtype, rows = query.dtype, tiles.rows

    def body(query: Any, key: Any, value: Any, low: Any, out: Any, log_sum: Any, own: Any, keys: Any, values: Any):
        # The last tiles have most keys; they come first, so that no multiprocessor ends with one.
        number, head, sequence = (lax.axis_index(axis) for axis in ("tile", "head", "sequence"))
        row = (shape.tokens // rows - 1 - number) * rows
        key_head = lax.div(head, jnp.int32(shape.group))
        copy(query.at[shape.tile(sequence, row, rows, head)], own)
        bounds = Bounds(load(low.at[sequence, pl.ds(row, rows)], 0, dtype), None, low[sequence, row + rows - 1], row)
        first = lax.div(low[sequence, row], jnp.int32(tiles.walked))
        end = lax.div(row + rows - 1, jnp.int32(tiles.walked)) + 1

        def start_copies(step: Array, slot: Array) -> None:
            place = shape.tile(sequence, (first + step) * tiles.walked, tiles.walked, key_head)
            copy(key.at[place], keys.at[slot])
            copy(value.at[place], values.at[slot])

        def step(number: Array, slot: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            sums, top, total = carry
            logits = product_transposed(own, keys.at[slot]) * shape.scale_base_2
            logits = bounds.mask(logits, row, (first + number) * tiles.walked, dtype)
            new_top = jnp.maximum(top, jnp.max(logits, axis=1))
            decay = jnp.exp2(top - new_top)
            weights = jnp.exp2(logits - across(new_top, logits.shape, 0))
            sums = sums * across(decay, sums.shape, 0)
            return add_product(sums, weights, values.at[slot]), new_top, total * decay + jnp.sum(weights, axis=1)

        init = zeros(rows, shape.width, dtype), by_row(MASKED, rows, dtype), by_row(0, rows, dtype)
        sums, top, total = pipelined(end - first, tiles.slots, 2, start_copies, step, init)
        result = sums / across(total, sums.shape, 0)
        store(result.astype(dtype), out.at[shape.tile(sequence, row, rows, head)])
        store(top + jnp.log2(total), log_sum.at[sequence, head, pl.ds(row, rows)])

    flat = [shape.flat(array) for array in (query, key, value)]
    outs = struct(flat[0].shape, dtype), struct((shape.sequences, shape.heads, shape.tokens), jnp.float32)
    grid = {"tile": shape.tokens // rows, "head": shape.heads, "sequence": shape.sequences}
    memory = scratch(tiles, 1, shape.width, dtype)
    out, log_sum = launch("flash_forward", body, outs, memory, grid, interpret)(*flat, low)
    return out.reshape(query.shape), log_sum
