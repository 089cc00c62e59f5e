"""Linear maps whose frozen weight lies in a stack of layers and is read there: one product, adapter included.

On Hopper the expert kernel does this too, with one group of rows: it indexes the stack in place, adds the low-rank term
in the same accumulators and rounds once, where XLA would copy the layer's weight out of the stack and write a float32
result to memory for the adapter to be added to.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.dispatch import implementation
from jaxmoe.layers import Adapter, fold, two_terms, unfold

_RANK_MULTIPLE = 64  # what the kernel's low-rank term is padded to
MIN_ROWS = 512  # below, a product reads the weight only once anyway and XLA's is as good


def takes(x: Float[Array, "*batch inner"], stack: Float[Array, "L out inner"]) -> bool:
    """Whether `frozen_linear` runs on this device for these sizes."""
    rows = x.size // x.shape[-1]
    fits = rows >= MIN_ROWS and rows % 8 == 0 and all(size % 64 == 0 for size in stack.shape[1:])
    return fits and x.dtype == stack.dtype and implementation(x.dtype).name == "mosaic"


def frozen_linear(
    x: Float[Array, "*batch inner"],
    stack: Float[Array, "L out inner"],
    layer: Int[Array, ""] | int,
    bias: Float[Array, " out"] | None = None,
    adapter: Adapter | None = None,
) -> Float[Array, "*batch out"]:
    """Forms x W^T + b + scale (x A^T) B^T with W = stack[layer], in float32, rounded once; W gets no gradient."""
    pair = None if adapter is None else (adapter.lora_A, adapter.scale * adapter.lora_B)
    y: Array = _product(x.reshape(-1, x.shape[-1]), stack, jnp.asarray(layer, jnp.int32), pair)
    if bias is not None:
        y = (y.astype(jnp.float32) + bias).astype(y.dtype)
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _product(x: Array, stack: Array, layer: Any, adapter: tuple[Array, Array] | None) -> Array:
    return _product_forward(x, stack, layer, adapter)[0]


def _blocks(rows: int) -> Any:
    from jaxmoe.kernels.grouped_matmul import Blocks

    count = -(-rows // 128)
    place = 4 * jnp.arange(count, dtype=jnp.int32) + 1
    return Blocks(place, jnp.zeros(count, jnp.int32), jnp.asarray(count, jnp.int32))


def _padded(adapter: tuple[Array, Array], dtype: Any) -> tuple[Array, Array]:
    """The adapter's two terms in the activations' dtype, their rank a multiple of 64: free up to a rank of 32."""
    a, b = two_terms(adapter[0], dtype, 0), two_terms(adapter[1], dtype, 1)
    extra = -a.shape[0] % _RANK_MULTIPLE
    return jnp.pad(a, ((0, extra), (0, 0))), jnp.pad(b, ((0, 0), (0, extra)))


def _dot(equation: str, a: Array, b: Array) -> Array:
    """In float32: with a 16-bit result XLA may split a long sum and add the parts in 16 bits."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _product_forward(x: Array, stack: Array, layer: Any, adapter: tuple[Array, Array] | None):
    from jaxmoe.kernels.grouped_matmul import grouped_matmul

    low: dict[str, Any] = {}
    if adapter is not None:
        a, b = _padded(adapter, x.dtype)
        rows = fold(_dot("mi,ri->mr", x, a), adapter[0].shape[0]).astype(x.dtype)
        low = {"low": unfold(rows, a.shape[0]), "low_weight": b[None]}
    return grouped_matmul(x, stack, _blocks(x.shape[0]), layer, transposed=True, **low), (x, stack, layer, adapter)


def _product_backward(residuals: tuple[Any, ...], d_y: Array):
    from jaxmoe.kernels.grouped_matmul import grouped_matmul

    x, stack, layer, adapter = residuals
    multiply = partial(grouped_matmul, d_y, stack, _blocks(x.shape[0]), layer, transposed=False)
    if adapter is None:
        return multiply(), None, None, None
    r = adapter[0].shape[0]
    a, b = _padded(adapter, x.dtype)
    d_low = fold(_dot("mo,or->mr", d_y, b), r).astype(x.dtype)
    low = fold(_dot("mi,ri->mr", x, a), r).astype(x.dtype)
    d_a, d_b = _dot("mr,mi->ri", d_low, x), _dot("mo,mr->or", d_y, low)
    d_x = multiply(low=unfold(d_low, a.shape[0]), low_weight=a[None])
    return d_x, None, None, (d_a.astype(adapter[0].dtype), d_b.astype(adapter[1].dtype))


_product.defvjp(_product_forward, _product_backward)
