"""The grouped products in pure JAX: a loop over tiles of rows, each of one expert.

It runs anywhere and in any dtype. On a GPU it is the slow fallback, and what kernels are compared with.
`jax.lax.ragged_dot`, in `ragged`, is not used by default: on a CPU, and with older versions of cuDNN, it builds
[rows, E, ...] temporaries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops.contraction import product
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.schedule import Schedule
from jaxmoe.ops.swiglu import swiglu_of_product
from jaxmoe.quantized_stack import QuantizedStack


def grouped_matmul(
    x: Float[Array, "P inner"],
    weight: Float[Array, "groups a b"] | QuantizedStack,
    tile_group: Int[Array, " tiles"],
    tiles_used: Int[Array, ""],
    offset: Any = 0,
    *,
    transposed: bool,
    low: Float[Array, "P rank"] | None = None,
    low_weight: Float[Array, "low_groups c d"] | None = None,
) -> Float[Array, "P out"]:
    """Each tile of rows times weight[offset + its group], summed in float32, rounded once; unused tiles yield zeros.

    `weight` is [groups, out, inner] and contracted over `inner` if `transposed`, else [groups, inner, out]. A low-rank
    term low @ low_weight[group], with the same layout, is added before rounding. A quantised expert is decoded when one
    of its tiles is multiplied.
    """
    tiles = tile_group.shape[0]
    tile = x.shape[0] // tiles
    _, a, b = weight.shape
    width = a if transposed else b
    equation = "cti,coi->cto" if transposed else "cti,cio->cto"
    c = _tiles_per_step(tiles, tile, weight.shape)
    x, tile_group = _whole_steps(x, tile_group, c)
    if low is not None:
        low, _ = _whole_steps(low, tile_group[:tiles], c)

    def step(i: Array, y: Array) -> Array:
        rows, group = (jax.lax.dynamic_slice_in_dim(array, i * c, c) for array in (x, tile_group))
        out = product(equation, rows, weight[offset + group])
        if low is not None:
            assert low_weight is not None
            out += product(equation, jax.lax.dynamic_slice_in_dim(low, i * c, c), low_weight[group])
        return jax.lax.dynamic_update_slice_in_dim(y, out.astype(y.dtype), i * c, 0)

    y = jax.lax.fori_loop(0, -(-tiles_used // c), step, jnp.zeros((x.shape[0], tile, width), x.dtype))
    return y[:tiles].reshape(tiles * tile, width)


def grouped_outer(
    left: Float[Array, "P A"],
    right: Float[Array, "P C"],
    tile_group: Int[Array, " tiles"],
    tiles_used: Int[Array, ""],
    groups: int,
) -> Float[Array, "groups A C"]:
    """For each group the sum over its rows of left[row]^T right[row], in float32 and in a fixed order.

    Padding rows of tiles in use must be zero in `left` or `right`.
    """
    tiles = tile_group.shape[0]
    shape = (groups, left.shape[1], right.shape[1])
    c = _tiles_per_step(tiles, left.shape[0] // tiles, shape)
    left, padded_group = _whole_steps(left, tile_group, c)
    right, _ = _whole_steps(right, tile_group, c)

    def step(i: Array, total: Array) -> Array:
        a, b, owner = (jax.lax.dynamic_slice_in_dim(array, i * c, c) for array in (left, right, padded_group))
        part = product("cta,ctb->cab", a, b)
        if c == 1:
            return total.at[owner[0]].add(part[0])
        # A product with the one-hot owner instead of a scatter-add, whose order on a GPU is not fixed.
        used = (i * c + jnp.arange(c) < tiles_used)[:, None]
        return total + product("cg,cab->gab", jax.nn.one_hot(owner, groups) * used, part)

    return jax.lax.fori_loop(0, -(-tiles_used // c), step, jnp.zeros(shape, jnp.float32))


def _tiles_per_step(tiles: int, tile: int, shape: tuple[int, ...]) -> int:
    """Tiles multiplied at once by the loop: as many as keep their gathered weights below the size of the rows.

    One on a CPU, where a tile's matmul already fills the cores and a batched one runs slower.
    """
    if jax.default_backend() == "cpu":
        return 1
    _, a, b = shape
    return max(1, min(tiles, tiles * tile * max(a, b) // (a * b)))


def _whole_steps(rows: Array, tile_group: Array, c: int) -> tuple[Array, Array]:
    """Rows as [tiles, tile, width] and the tiles' groups, both lengthened to a multiple of c tiles."""
    tiles = tile_group.shape[0]
    extra = -tiles % c
    rows = jnp.pad(rows.reshape(tiles, -1, rows.shape[-1]), ((0, extra), (0, 0), (0, 0)))
    return rows, jnp.pad(tile_group, (0, extra), mode="edge")


class Xla:
    """The implementation "tiled" of the grouped products."""

    rank_multiple = 1
    min_linear_rows = None
    linear_decodes = False

    def unsupported(self, dtype: Any, *widths: int) -> str | None:
        """None: it runs anywhere."""
        return None

    def tile_rows(self, routed_rows: int, num_experts: int) -> int:
        """A power of two from 8 to 128, about half an expert's mean load, so that padding stays small."""
        mean = max(1, routed_rows // num_experts)
        return min(128, max(8, 1 << (mean.bit_length() - 1) >> 1))

    def span_rows(self, routed_rows: int, num_experts: int) -> tuple[int, ...]:
        """Empty: it reads tiles, not spans."""
        return ()

    def matmul(
        self,
        x: Array,
        weight: Array | QuantizedStack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool = False,
        low: LowRankTerm | None = None,
    ) -> Array:
        """As `GroupedMatmul.matmul`."""
        rows, low_weight = low if low is not None else (None, None)
        tiles = schedule.tile_expert, schedule.tiles_used
        y: Array = grouped_matmul(x, weight, *tiles, offset, transposed=transposed, low=rows, low_weight=low_weight)
        return swiglu_of_product(y) if swiglu else y

    def outer(self, left: Array, right: Array, schedule: Schedule) -> Array:
        """As `GroupedMatmul.outer`."""
        where = schedule.tile_expert, schedule.tiles_used, schedule.first_tile.shape[0]
        if 4 * right.shape[1] > left.shape[1]:
            return grouped_outer(left, right, *where)
        # On a CPU the loop takes half the time with the narrow side, an adapter's rank, in front.
        return grouped_outer(right, left, *where).swapaxes(1, 2)

    def linear(self, *_: Any, **__: Any) -> Array:
        """Not offered: a plain product already reads a weight only once."""
        raise AssertionError("min_linear_rows is None")


XLA = Xla()
