"""RMSNorm and rotation of queries and keys in one pass over memory; XLA needs two passes forwards and two backwards.

A Pallas kernel in Mosaic GPU, for compute capability 8.0 and newer. It computes `apply_rotary(rms_norm(x))` of
`jaxmoe.ops` and its gradient in float32 and rounds once, at the end. A tile has one head of several tokens, so that
cosine and sine are read once for the heads of a program. On an H200 a LoRA step of Qwen3-30B-A3B with XLA's passes
takes 2 % longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxmoe.ops.frozen import define_vjp
from jaxmoe.ops.kernels import ampere
from jaxmoe.ops.kernels.row_tiles import across, load, rows_of

Halves = tuple[Array, Array]  # of heads: the first columns of pairs, the second ones
_HEADS = 4  # per program, at most
_HALVES = (16, 32, 64, 128)  # columns of half a head


def unsupported(x: Array) -> str | None:
    """Why `norm_rotary` cannot run on these queries or keys [B, T, heads, H]; None if it can."""
    if (why := ampere.unsupported(x.dtype)) is not None:
        return why
    if (half := x.shape[-1] // 2) not in _HALVES:
        return f"needs heads of 32, 64, 128 or 256 columns, found {x.shape[-1]}"
    if (tokens := math.prod(x.shape[:-2])) % rows_of(half):
        return f"needs a multiple of {rows_of(half)} tokens, found {tokens}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def norm_rotary(
    x: Float[Array, "B T heads H"],
    weight: Float[Array, " H"],
    cos: Float[Array, "B T H2"],
    sin: Float[Array, "B T H2"],
    eps: float,
    interpret: Any = None,
) -> Float[Array, "B T heads H"]:
    """RMSNorm over each head, then rotation of its pairs (i, i + H/2). `weight` is frozen and gets no gradient.

    `interpret`: parameters of JAX's interpreter.
    """
    return _rotary(x, None, weight, cos, sin, eps, interpret)


def _norm_rotary_forward(x, weight, cos, sin, eps, interpret):
    return _rotary(x, None, weight, cos, sin, eps, interpret), (x, weight, cos, sin)


def _norm_rotary_backward(eps, interpret, residuals, d_out):
    x, weight, cos, sin = residuals
    return _rotary(x, d_out, weight, cos, sin, eps, interpret), None, None, None


define_vjp(norm_rotary, _norm_rotary_forward, _norm_rotary_backward, frozen={1: "norms of queries and keys"})


def _rotary(x: Array, d_out: Array | None, weight: Array, cos: Array, sin: Array, eps: float, interpret: Any) -> Array:
    """The output, or, if the output's gradient `d_out` is given, the gradient of x."""
    heads, H = x.shape[-2:]
    half = H // 2
    rows, group = rows_of(half), math.gcd(heads, _HEADS)
    operands = [each.reshape(-1, heads * H) for each in (x, d_out) if each is not None]
    tables = [weight.astype(jnp.float32), cos.reshape(-1, half), sin.reshape(-1, half)]

    def mean(a: Halves, b: Halves) -> Array:
        total = jnp.sum(a[0] * b[0], axis=1) + jnp.sum(a[1] * b[1], axis=1)
        return across(total / H, (rows, half), 0)

    def body(*refs: Any) -> None:
        *data, weight, cos, sin, out = refs
        own = pl.ds(lax.axis_index("tile") * rows, rows)
        first_head = lax.axis_index("heads") * group

        def of_head(head: int, ref: Any) -> list[Any]:
            start = (first_head + head) * H
            return [ref.at[own, pl.ds(start, half)], ref.at[own, pl.ds(start + half, half)]]

        # All loads come before the first store: no load is moved across a store, which might change its value.
        loaded = [[[load(part, half) for part in of_head(head, ref)] for ref in data] for head in range(group)]
        turn: Any = tuple(load(table.at[own], half) for table in (cos, sin))
        parts = (load(weight.at[pl.ds(start, half)], half, 1) for start in (0, half))
        scales: Any = tuple(across(part, (rows, half), 1) for part in parts)
        for head, tiles in enumerate(loaded):
            own_x, *rest = ((first.astype(jnp.float32), second.astype(jnp.float32)) for first, second in tiles)
            result = _of_halves(own_x, rest[0] if rest else None, scales, turn, eps, mean)
            for place, part in zip(of_head(head, out), result, strict=True):
                ampere.store(part.astype(operands[0].dtype), place)

    out = jax.ShapeDtypeStruct(operands[0].shape, x.dtype)
    grid = {"heads": heads // group, "tile": operands[0].shape[0] // rows}
    return ampere.launch("norm_rotary", body, out, [], grid, interpret)(*operands, *tables).reshape(x.shape)


def _of_halves(
    x: Halves, d_out: Halves | None, weight: Halves, tables: Halves, eps: float, mean: Callable[[Halves, Halves], Array]
) -> Halves:
    """The output, or the gradient of x, of heads in two halves, float32.

    `tables` are cosine and sine; `mean` gives the mean over each head of the product of two heads.
    """
    (w_first, w_second), (cos, sin) = weight, tables
    scale = lax.rsqrt(mean(x, x) + eps)
    first, second = (part * scale for part in x)
    if d_out is None:
        first, second = first * w_first, second * w_second
        return first * cos - second * sin, second * cos + first * sin
    d_first, d_second = d_out
    d_first, d_second = (d_first * cos + d_second * sin) * w_first, (d_second * cos - d_first * sin) * w_second
    along = mean((first, second), (d_first, d_second))
    return scale * (d_first - first * along), scale * (d_second - second * along)


class OnePass:
    """The implementation "mosaic" of norm and rotation."""

    def unsupported(self, x: Array, frozen: bool) -> str | None:
        """Why it cannot run on these queries or keys [B, T, heads, H]; `frozen`: the norm's weight has no gradient."""
        return unsupported(x) if frozen else "needs a frozen norm"

    def __call__(
        self, x: Float[Array, "B T heads H"], weight: Float[Array, " H"], tables: tuple[Array, Array], eps: float
    ) -> Float[Array, "B T heads H"]:
        """Normalises by head and rotates, rounded once; `tables` are cosine and sine [B, T, H/2]."""
        return norm_rotary(x, weight, *tables, eps)


ONE_PASS = OnePass()
