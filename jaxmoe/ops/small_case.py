"""A small case that an implementation runs once in a process, on cards and libraries that nobody could test it with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
from jaxtyping import Array

BOUND = 2e-2  # relative L2; rounding to bfloat16 gives 4e-3, a wrong group or segment more than 1


def relative_error(found: Array, exact: Array) -> Array:
    """The relative L2 error; infinite if it is not a number."""
    found, exact = found.astype(jnp.float32), exact.astype(jnp.float32)
    error = jnp.linalg.norm((found - exact).ravel()) / jnp.linalg.norm(exact.ravel())
    return jnp.where(jnp.isnan(error), jnp.inf, error)


def why_not(error: Callable[[], float], what: str) -> str | None:
    """Why the implementation should not be used: the case fails, or its relative error is too large; None if neither.

    It may be called while a function is being traced, so the case runs in a thread of its own.
    """
    with ThreadPoolExecutor(1) as pool:
        try:
            found = pool.submit(error).result()
        except Exception as failure:  # whatever JAX, XLA or a library raises, it is of no use here
            return f"cannot run {what} here: {(str(failure).splitlines() or [type(failure).__name__])[0][:200]}"
    if found <= BOUND:
        return None
    return f"is wrong on {what} here: expected an error of at most {BOUND:.0e}, found {found:.1e}"
