"""The residual sum and the norm after it in one launch; XLA needs one for the sum of squares and one for the rest.

A Pallas kernel in Triton, for any NVIDIA GPU. A program handles one token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxmoe.ops.norm import StackedNorm

_MOST_TOKENS = 64  # with more, two launches take as long


def unsupported(h: Any) -> str | None:
    """Why the kernel cannot run on these tokens [..., D]; None if it can."""
    tokens, width = h.size // h.shape[-1], h.shape[-1]
    if h.dtype != jnp.float32:
        return f"needs a residual stream in float32, found {h.dtype.name}"
    if tokens > _MOST_TOKENS:
        return f"needs at most {_MOST_TOKENS} tokens, found {tokens}"
    return None if width <= 16384 else f"needs a width of at most 16384, found {width}"


def add_and_norm(
    h: Float[Array, "*batch D"],
    update: Float[Array, "*batch D"] | None,
    norm: StackedNorm,
    dtype: Any,
    interpret: bool = False,
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """As `jaxmoe.ops.residual_norm.add_and_norm`."""
    D = h.shape[-1]
    columns = pl.next_power_of_2(D)
    inputs = [h] if update is None else [h, update]
    flat = [array.reshape(-1, D) for array in inputs]

    def body(*refs: Any) -> None:
        (*rows, stack, place), outs = refs[: len(flat) + 2], refs[len(flat) + 2 :]
        token, column = pl.program_id(0), jnp.arange(columns)
        inside = column < D

        def of(ref: Any, row: Any) -> Array:
            return triton.load(ref.at[row, column], mask=inside, other=0.0).astype(jnp.float32)

        total = of(rows[0], token)
        if update is not None:
            total += of(rows[1], token)
            triton.store(outs[1].at[token, column], total, mask=inside)
        scale = jax.lax.rsqrt(jnp.sum(total * total) / D + norm.eps)
        result = total * scale * of(stack, place[0])
        triton.store(outs[0].at[token, column], result.astype(dtype), mask=inside)

    dtypes = [dtype] if update is None else [dtype, h.dtype]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kernel = pl.pallas_call(
        body,
        grid=(len(flat[0]),),
        out_shape=[jax.ShapeDtypeStruct(flat[0].shape, each) for each in dtypes],
        in_specs=[anywhere] * (len(flat) + 2),
        out_specs=[anywhere] * len(dtypes),
        compiler_params=triton.CompilerParams(num_warps=8),
        interpret=interpret,
        name="residual_norm",
    )
    x, *sums = kernel(*flat, norm.stack, jnp.asarray(norm.place, jnp.int32).reshape(1))
    return (sums[0].reshape(h.shape) if sums else h), x.reshape(h.shape)


class OneLaunch:
    """The implementation "triton"."""

    def unsupported(self, h: Any) -> str | None:
        """Why it cannot run on these tokens [..., D], or None."""
        return unsupported(h)

    def __call__(self, h: Array, update: Array | None, norm: StackedNorm, dtype: Any) -> tuple[Array, Array]:
        """As `jaxmoe.ops.residual_norm.add_and_norm`."""
        return add_and_norm(h, update, norm, dtype)


ONE_LAUNCH = OneLaunch()
