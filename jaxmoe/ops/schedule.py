"""The layout of rows: where each routed copy of a token lies, sorted by expert.

The R = M*k routed rows are laid out expert by expert, each expert's rows padded to whole tiles, so that a tile of rows
belongs to one expert:

    destination: routed row (token*k + slot) -> position in the padded layout
    source:      position -> routed row, or -1 for padding

No token is ever dropped: the layout has room for every routed row whatever the skew. The number of tiles in use is a
value, not a shape; its bound, floor(R / tile) + min(E, R), is static. Both directions of both permutations are gathers,
and the sums over k run in a fixed order, so the result is deterministic. Nothing of size [M, E, ...] exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class Spans(NamedTuple):
    """Adjacent tiles of one group, which a kernel runs together: each span's first tile, its number of tiles, and its
    group; only the first `used` spans exist."""

    first: Int[Array, " spans"]
    height: Int[Array, " spans"]
    group: Int[Array, " spans"]
    used: Int[Array, ""]


class Schedule(NamedTuple):
    """Where every routed row lies, and which expert each tile of rows belongs to (P = tiles * tile positions).

    `first_tile` and `tile_count` hold the same information by expert. `spans` holds it in the form that a GPU kernel
    reads, keyed by the largest number of rows in a span; it is made once for all products of a layer.
    """

    destination: Int[Array, "M k"]
    source: Int[Array, " P"]
    tile_expert: Int[Array, " tiles"]
    tiles_used: Int[Array, ""]
    first_tile: Int[Array, " E"]
    tile_count: Int[Array, " E"]
    spans: dict[int, Spans]


def make_schedule(
    experts: Int[Array, "M k"],
    num_experts: int,
    tile: int,
    span_rows: Sequence[int] = (),
    *,
    some_nowhere: bool = False,
) -> Schedule:
    """Lays out the routed rows by expert; rows of one expert keep the order of their tokens.

    A counting sort: a row's place is its expert's first place plus the number of earlier rows of that expert.

    Args:
        experts: the experts that each token is routed to.
        num_experts: E.
        tile: rows per tile.
        span_rows: the heights, in rows, to list spans for, if a kernel will read them.
        some_nowhere: some rows have the expert E, which does not exist; their places, which count as padding, lie after
            the tiles that are used.
    """
    rows = experts.size
    flat = experts.reshape(-1).astype(jnp.int32)
    groups = num_experts + some_nowhere
    tiles = rows // tile + min(groups, rows)

    # In pieces of about as many rows as there are pieces. Within a piece, rows are compared with each other; of the
    # pieces before it, only the rows of each expert are counted.
    length = 1 << rows.bit_length() // 2
    pieces = jnp.pad(flat, (0, -rows % length), constant_values=groups).reshape(-1, length)
    count = partial(jnp.sum, dtype=jnp.int32)
    hits = count(pieces[:, :, None] == jnp.arange(groups), axis=1)
    before = _sum_before(hits)
    tile_count = (before[-1] + hits[-1] + tile - 1) // tile
    first_tile = _sum_before(tile_count)
    tile_end = first_tile + tile_count

    earlier = count((pieces[:, :, None] == pieces[:, None, :]) & jnp.tri(length, k=-1, dtype=bool), axis=2)
    start = first_tile * tile + before
    destination = (jnp.take_along_axis(start, pieces, axis=1, mode="clip") + earlier).reshape(-1)[:rows]
    index = jnp.arange(rows, dtype=jnp.int32)
    source = jnp.full(tiles * tile, -1, jnp.int32)
    source = source.at[destination].set(index, unique_indices=True, mode="promise_in_bounds")

    if some_nowhere:
        source = jnp.where(jnp.arange(tiles * tile) < first_tile[-1] * tile, source, -1)
        first_tile, tile_count, tile_end = first_tile[:-1], tile_count[:-1], tile_end[:-1]
    # Tiles past the last used one are given to the last expert; they hold only padding.
    ends = jnp.searchsorted(tile_end, jnp.arange(tiles), side="right", method="compare_all")
    tile_expert = jnp.minimum(ends, num_experts - 1).astype(jnp.int32)
    spans = {most: _spans(first_tile, tile_count, tiles, most // tile) for most in span_rows}
    destination = destination.reshape(experts.shape)
    return Schedule(destination, source, tile_expert, tile_end[-1], first_tile, tile_count, spans)


def of_experts(schedule: Schedule, chosen: Bool[Array, " E"], tile: int) -> Schedule:
    """The same layout, but a kernel that reads spans or `tile_count` finds rows of the chosen experts only.

    Args:
        schedule: the whole layout, with spans.
        chosen: the experts that count.
        tile: rows per tile.
    """
    tile_count = jnp.where(chosen, schedule.tile_count, 0)
    tiles = schedule.tile_expert.shape[0]
    spans = {most: _spans(schedule.first_tile, tile_count, tiles, most // tile) for most in schedule.spans}
    return schedule._replace(tile_count=tile_count, spans=spans)


def _sum_before(counts: Int[Array, "n *rest"]) -> Int[Array, "n *rest"]:  # noqa: F821 - dimensions, not a product
    """The sum of all earlier entries along the first axis, in a form that XLA fuses with its operands."""
    earlier = jnp.tri(counts.shape[0], k=-1, dtype=bool).reshape(*2 * counts.shape[:1], *(1,) * (counts.ndim - 1))
    return jnp.sum(jnp.where(earlier, counts, 0), axis=1, dtype=jnp.int32)


def _spans(first_tile: Int[Array, " E"], tile_count: Int[Array, " E"], tiles: int, most: int) -> Spans:
    """Spans of at most `most` tiles; those of one expert differ by at most one tile.

    With nearly equal heights the multiprocessors stay in step and read the same weights at the same time.
    """
    E = tile_count.shape[0]
    spans_of_expert = -(-tile_count // most)
    end = _sum_before(spans_of_expert) + spans_of_expert
    index = jnp.arange(tiles // most + E, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end, index, side="right", method="compare_all"), E - 1).astype(jnp.int32)
    within = index - (end - spans_of_expert)[expert]
    height, higher = jnp.divmod(tile_count[expert], jnp.maximum(spans_of_expert[expert], 1))
    first = first_tile[expert] + within * height + jnp.minimum(within, higher)
    return Spans(first, height + (within < higher), expert, end[-1])


def rows_at(x: Shaped[Array, "rows D"], index: Int[Array, "*places"]) -> Shaped[Array, "*places D"]:
    """Rows of x. The indices are a schedule's, all in bounds, so none is checked.

    Only for gathers that stand alone: fused with a sum, as in `jaxmoe.ops.dispatch.combine`, this gather takes forty
    times as long.
    """
    return x.at[index].get(mode="promise_in_bounds")


def permute(x: Float[Array, "M D"], schedule: Schedule) -> Float[Array, "P D"]:
    """Copies each token's row to its k positions. Padding positions hold an arbitrary token's row; it is never read."""
    token = jnp.maximum(schedule.source, 0) // schedule.destination.shape[1]
    together = 4 // x.dtype.itemsize
    if together < 2 or x.shape[1] % together:
        return rows_at(x, token)
    # XLA copies element by element: gathering two 16-bit values as one takes three quarters of the time on a GPU.
    words = jax.lax.bitcast_convert_type(x.reshape(x.shape[0], -1, together), jnp.uint32)
    return jax.lax.bitcast_convert_type(rows_at(words, token), x.dtype).reshape(-1, x.shape[1])


class Gather:
    """The implementation "xla" of `permute` where nothing reads padding."""

    def unsupported(self, x: Any) -> str | None:
        """None: it runs anywhere."""
        return None

    def __call__(self, x: Float[Array, "M D"], schedule: Schedule) -> Float[Array, "P D"]:
        """As `permute`."""
        return permute(x, schedule)


GATHER = Gather()


def row_weights(weights: Float[Array, "M k"], schedule: Schedule) -> Float[Array, "P 1"]:
    """The weight of each position's routed row, zero at padding."""
    source = schedule.source
    return jnp.where(source >= 0, weights.reshape(-1)[jnp.maximum(source, 0)], 0)[:, None]
