"""What both kernels for Ampere and newer cards share: products of matrices in shared memory, and their items of work.

The warps share the columns of a product, so a warp holds all rows of its columns and results can be stored in units of
16 rows. Two thread blocks share a multiprocessor, so that one multiplies while the other waits.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from jaxmoe.ops.kernels.grouped_matmul.ampere_tiles import BLOCKS

plgpu: Any = mosaic_gpu  # untyped: jax 0.10 lacks much of it


def sums_of(shape: tuple[int, int], dtype: Any) -> Array:
    """Zeros in the layout of a product's sums; `dtype` is that of the operands."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.MMA_ACC(dtype, m_warps=1))


def multiply(sums: Array, left: Any, right: Any) -> Array:
    """`sums` plus left @ right, two matrices in shared memory."""
    a = plgpu.load(left, layout=plgpu.Layout.MMA_LHS(left.dtype, m_warps=1))
    b = plgpu.load(right, layout=plgpu.Layout.MMA_RHS(left.dtype, m_warps=1))
    return plgpu.mma(sums, a, b)


def turns(items: Array | int) -> Array:
    """How many of the items this thread block has: block b of n has b, b + n, b + 2n, ..."""
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    return lax.div(jnp.int32(items) - block + blocks - 1, jnp.int32(blocks))


def item_of(turn: Array) -> Array:
    """The number of this thread block's item."""
    return lax.axis_index("block") + turn * lax.axis_size("block")


def grid() -> dict[str, int]:
    """As many thread blocks as run at a time on the default device."""
    return {"block": BLOCKS * (jax.devices()[0].core_count if jax.default_backend() == "gpu" else 1)}
