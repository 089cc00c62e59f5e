"""Copies of each token's row to its places, without a pass through registers, in Pallas Mosaic GPU for Hopper.

A gather reads a row again for each of its k places. Here a thread block brings some tokens' rows to shared memory once
(TMA) and copies each from there to its places. What lies at padding is not written.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Int, Shaped

from jaxmoe.ops import small_case
from jaxmoe.ops.schedule import Schedule, make_schedule, permute

plgpu: Any = mosaic_gpu  # untyped: jax 0.10 lacks much of it

TOKENS = 8  # of a thread block
LEAST = 512  # tokens
_PIECE = 256  # TMA's limit for the extent of a copy along an axis


def unsupported(x: Any) -> str | None:
    """Why `copy_rows` cannot run on these rows [M, D]; None if it can."""
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or newer (Python 3.12 or newer), found {jax.__version__}"
    if jnp.dtype(x.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, found {jnp.dtype(x.dtype).name}"
    if x.shape[0] % TOKENS or x.shape[0] < LEAST:
        return f"needs a multiple of {TOKENS} tokens, at least {LEAST}, found {x.shape[0]}"
    if x.shape[1] % _PIECE or x.shape[1] > _PIECE * _PIECE:
        return f"needs a width that is a multiple of {_PIECE}, found {x.shape[1]}"
    return None


def copy_rows(
    x: Shaped[Array, "M D"], destination: Int[Array, "M k"], places: int, interpret: Any = None
) -> Shaped[Array, "P D"]:
    """The rows at their places, which are all different; other places are undefined.

    Args:
        x: rows in 16 bits.
        destination: where each row goes.
        places: P.
        interpret: parameters of JAX's interpreter, which runs the kernel without a GPU.
    """
    (M, D), k = x.shape, destination.shape[1]
    shape = D // _PIECE, _PIECE

    def program(x: Any, destination: Any, out: Any, rows: Any, arrived: Any) -> None:
        first = lax.axis_index("tokens") * TOKENS
        plgpu.copy_gmem_to_smem(x.at[pl.ds(first, TOKENS)], rows, arrived)
        at = [destination[first * k + number] for number in range(TOKENS * k)]
        plgpu.barrier_wait(arrived)
        for number, place in enumerate(at):
            plgpu.copy_smem_to_gmem(rows.at[pl.ds(number // k, 1)], out.at[pl.ds(place, 1)], commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    program.__name__ = "copy_rows"
    kernel = plgpu.kernel(
        program,
        out_type=jax.ShapeDtypeStruct((places, *shape), x.dtype),
        scratch_types=[plgpu.SMEM((TOKENS, *shape), x.dtype), plgpu.Barrier()],
        grid=(M // TOKENS,),
        grid_names=("tokens",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )
    return kernel(x.reshape(M, *shape), destination.reshape(-1)).reshape(places, D)


class Copies:
    """The implementation "mosaic" of `permute` where nothing reads padding."""

    def unsupported(self, x: Any) -> str | None:
        """As the function `unsupported`; on a GPU it first runs a small case."""
        if (why := unsupported(x)) is not None or jax.default_backend() != "gpu":
            return why
        return _small_case(x.shape[1], x.dtype.name)

    def __call__(self, x: Shaped[Array, "M D"], schedule: Schedule) -> Shaped[Array, "P D"]:
        """Each token's row at its k places; padding is undefined, and need not be numbers."""
        return copy_rows(x, schedule.destination, schedule.source.shape[0])


@cache
def _small_case(width: int, dtype: str) -> str | None:
    return small_case.why_not(partial(small_case_error, width, dtype), f"a few rows of {width} columns")


def small_case_error(width: int, dtype: str, interpret: Any = None) -> float:
    """Infinite unless every row has its bits at all of its places, otherwise 0."""
    x = jax.random.normal(jax.random.key(0), (2 * TOKENS, width)).astype(dtype)
    experts = jnp.arange(2 * TOKENS)[:, None] % 3 + jnp.arange(2)

    @jax.jit
    def error(x: Array) -> Array:
        schedule = make_schedule(experts, 4, 16)
        found = copy_rows(x, schedule.destination, schedule.source.shape[0], interpret)
        same = (schedule.source < 0) | jnp.all(found == permute(x, schedule), axis=1)
        return jnp.where(jnp.all(same), 0.0, jnp.inf)

    return float(error(x))


COPIES = Copies()
