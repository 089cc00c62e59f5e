"""How rows are multiplied by experts in FP8: by decoded weights, or forwards with the rows in FP8, too.

Then x W^T is a product of codes, unless a low-rank term joins it:

out[row] = sum over blocks b of 128 channels of  x_scale[row, b] * w_scale[column's block, b] * (x codes . W codes)[b]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmoe.fp8.codec import E4M3, LARGEST
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.ops.coded_products import CodedProducts, Decoded
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.kernels.grouped_matmul.xla import XLA
from jaxmoe.ops.schedule import Schedule
from jaxmoe.ops.swiglu import swiglu_of_product
from jaxmoe.parameters import FP8_BLOCK


class QuantizedRows(NamedTuple):
    """Rows in e4m3: codes [rows, inner], scales float32 [rows, ceil(inner / 128)]."""

    codes: Array
    scales: Array


def quantize_rows(x: Float[Array, "rows inner"]) -> QuantizedRows:
    """Each row and 128 channels with their own scale: the largest magnitude becomes 448; 1 for zeros."""
    rows, inner = x.shape
    parts = jnp.pad(x, ((0, 0), (0, -inner % FP8_BLOCK))).reshape(rows, -1, FP8_BLOCK).astype(jnp.float32)
    largest = jnp.abs(parts).max(axis=-1)
    scales = jnp.where(largest > 0, largest * (1 / LARGEST), 1)  # XLA would make this of a division
    codes = jnp.clip(parts / scales[..., None], -LARGEST, LARGEST).astype(E4M3)
    return QuantizedRows(codes.reshape(rows, -1)[:, :inner], scales)


def prepared(x: Float[Array, "rows inner"], stack: Any, *, low_rank: bool) -> Array | QuantizedRows:
    """The rows in the form in which they are multiplied with this stack, with a low-rank term or without.

    It depends on each row alone, so that tokens can be quantised once, before their rows are gathered.
    """
    quantizes = isinstance(stack, FP8Stack) and not low_rank and isinstance(_selected(stack), QuantizedProducts)
    return quantize_rows(x) if quantizes else x


def quantized_matmul(
    rows: QuantizedRows, stack: FP8Stack, schedule: Schedule, offset: Any, *, swiglu: bool
) -> Float[Array, "P out"]:
    """As `QuantizedProducts.quantized_matmul`, by the implementation for this stack."""
    selected = _selected(stack)
    assert isinstance(selected, QuantizedProducts)
    return selected.quantized_matmul(rows, stack, schedule, offset, swiglu=swiglu)


def _selected(stack: FP8Stack) -> CodedProducts:
    return choose("fp8_products", stack.dtype, stack).value


@runtime_checkable
class QuantizedProducts(CodedProducts, Protocol):
    """An implementation that also offers x W^T of rows in FP8."""

    def quantized_matmul(
        self, rows: QuantizedRows, stack: FP8Stack, schedule: Schedule, offset: Any, *, swiglu: bool
    ) -> Float[Array, "P out"]:
        """Rows times the transposed matrices of their experts, or SwiGLU of it, in the stack's dtype."""
        ...


class Xla(Decoded):
    """The implementation "xla", the oracle of "mosaic": rows and weights are decoded to float32."""

    def quantized_matmul(
        self, rows: QuantizedRows, stack: FP8Stack, schedule: Schedule, offset: Any, *, swiglu: bool
    ) -> Float[Array, "P out"]:
        """As `QuantizedProducts.quantized_matmul`."""
        inner = rows.codes.shape[1]
        x = rows.codes.astype(jnp.float32) * jnp.repeat(rows.scales, FP8_BLOCK, axis=1)[:, :inner]
        weights = replace(stack, dtype=jnp.dtype(jnp.float32))
        y = XLA.matmul(x, weights, schedule, offset, transposed=True).astype(stack.dtype)
        return swiglu_of_product(y) if swiglu else y


ORACLE = Xla()
