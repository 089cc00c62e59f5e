"""How the Hopper kernel multiplies rows by experts in FP8: decoded to 16 bits first, or as they are."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.fp8.codec import E4M3, LARGEST
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.schedule import Schedule
from jaxmoe.parameters import FP8_BLOCK


class QuantizedRows(NamedTuple):
    """Rows in e4m3: codes [rows, inner], scales float32 [rows, inner / 128]."""

    codes: Array
    scales: Array


def quantize_rows(x: Float[Array, "rows inner"]) -> QuantizedRows:
    """Each row and 128 channels with their own scale: the largest magnitude becomes 448; 1 for zeros."""
    parts = x.reshape(x.shape[0], -1, FP8_BLOCK).astype(jnp.float32)
    largest = jnp.abs(parts).max(axis=-1)
    scales = jnp.where(largest > 0, largest * (1 / LARGEST), 1)  # XLA would make this of a division
    codes = jnp.clip(parts / scales[..., None], -LARGEST, LARGEST).astype(E4M3)
    return QuantizedRows(codes.reshape(x.shape), scales)


def prepared(x: Float[Array, "rows inner"], stack: Any, *, low_rank: bool) -> Array | QuantizedRows:
    """The rows in the form in which `Hopper.matmul` multiplies them with this stack, with a low-rank term or without.

    It depends on each row alone, so that tokens can be quantised once, before their rows are gathered.
    """
    if isinstance(stack, FP8Stack) and not low_rank and products(stack).multiplies:
        return quantize_rows(x)
    return x


def products(stack: FP8Stack) -> FP8Products:
    """The implementation for this stack."""
    return choose("fp8_products", stack.dtype, stack).value


@runtime_checkable
class FP8Products(Protocol):
    """One implementation of x W^T and x W for grouped rows and a stack in FP8."""

    multiplies: bool  # False: the stack is decoded, and the products are those of 16-bit weights

    def unsupported(self, dtype: Any, stack: FP8Stack) -> str | None:
        """Why it cannot multiply rows of this dtype with this stack, or None."""
        ...

    def matmul(
        self, rows: QuantizedRows, stack: FP8Stack, schedule: Schedule, offset: Any, *, transposed: bool, swiglu: bool
    ) -> Float[Array, "P out"]:
        """As `GroupedMatmul.matmul`, in the stack's dtype."""
        ...


class Decoded:
    """The implementation "decoded": the numbers are those of the decoded weights."""

    multiplies = False

    def unsupported(self, dtype: Any, stack: FP8Stack) -> str | None:
        """None: it runs anywhere."""
        return None

    def matmul(self, *_: Any, **__: Any) -> Array:
        """Not offered."""
        raise AssertionError("multiplies is False")


DECODED = Decoded()
