"""The k most probable experts of each token, in Pallas Mosaic GPU: a tile of scores stays in registers.

XLA sorts all scores of a token. Here the largest is found and removed, k times. The result lies in memory token by
token, as that of XLA's sort does: with another layout XLA adds up a token's weights in another order, and their last
bits change.
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
from jaxmoe.ops.kernels import ampere
from jaxmoe.ops.kernels.row_tiles import across, layout, load, plgpu, rows_of

LEAST = 512  # tokens
_WIDTHS = (32, 64, 128, 256)  # experts


def unsupported(scores: Any, count: int) -> str | None:
    """Why `top_experts` cannot run on these scores [M, E]; None if it can."""
    if (why := ampere.unsupported(jnp.bfloat16)) is not None:
        return why
    tokens, experts = scores.shape
    if experts not in _WIDTHS or count > 16:
        return f"needs 32, 64, 128 or 256 experts, 16 of a token at most, found {experts} and {count}"
    if scores.dtype != jnp.float32 or tokens < LEAST or tokens % rows_of(experts):
        return f"needs a multiple of {rows_of(experts)} tokens, at least {LEAST}, in float32, found {tokens}"
    return None


def top_experts(scores: Float[Array, "M E"], count: int, interpret: Any = None) -> Int[Array, "M count"]:
    """The indices of the largest scores in descending order; ties go to the lowest index.

    Args:
        scores: finite float32 numbers.
        count: how many.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.
    """
    M, E = scores.shape
    rows = rows_of(E)

    def body(scores: Any, out: Any) -> None:
        own = pl.ds(lax.axis_index("tile") * rows, rows)
        left = load(scores.at[own], E)
        before_end = E - plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, (rows, E), 1, layout=layout(E)), layout(E))
        before_end = before_end.astype(jnp.float32)
        for number in range(count):
            largest = across(jnp.max(left, axis=1), (rows, E), 0)
            found = jnp.max(jnp.where(left == largest, before_end, 0.0), axis=1)  # the first of equal ones
            # Nothing equals NaN; the bound keeps the index a valid one.
            ampere.store(jnp.minimum(E - found, E - 1.0).astype(jnp.int32), out.at[own, number])
            left = jnp.where(before_end == across(found, (rows, E), 0), -jnp.inf, left)

    out = jax.ShapeDtypeStruct((M, count), jnp.int32)
    return ampere.launch("top_experts", body, out, [], {"tile": M // rows}, interpret)(scores)


class Top:
    """The implementation "mosaic" of the choice of experts."""

    def unsupported(self, scores: Any, count: int) -> str | None:
        """As the function `unsupported`; on a GPU it first runs a small case."""
        if (why := unsupported(scores, count)) is not None or jax.default_backend() != "gpu":
            return why
        return _small_case(scores.shape[1], count)

    def __call__(self, scores: Float[Array, "M E"], count: int) -> Int[Array, "M count"]:
        """As `top_experts`."""
        return top_experts(scores, count)


@cache
def _small_case(experts: int, count: int) -> str | None:
    return small_case.why_not(partial(small_case_error, experts, count), f"{count} of {experts} scores")


def small_case_error(experts: int, count: int, interpret: Any = None) -> float:
    """Infinite unless the indices are those of `jax.lax.top_k` for scores of which many are equal, otherwise 0."""
    scores = jax.random.randint(jax.random.key(0), (rows_of(experts), experts), 0, experts // 4) / 7.0

    @jax.jit
    def error(scores: Array) -> Array:
        same = jnp.array_equal(top_experts(scores, count, interpret), jax.lax.top_k(scores, count)[1])
        return jnp.where(same, 0.0, jnp.inf)

    return float(error(scores))


TOP = Top()
