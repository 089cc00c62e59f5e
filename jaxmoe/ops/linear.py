"""Linear maps with a bias and an adapter, whatever form their weight is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.ops import projections
from jaxmoe.ops.contraction import contract, product
from jaxmoe.ops.few_rows import FewRows, Rows
from jaxmoe.ops.frozen import define_vjp
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.low_rank import Adapter, low_rank
from jaxmoe.quantized_stack import QuantizedStack


def linear(
    x: Float[Array, "*batch inner"],
    weight: Float[Array, "out inner"],
    bias: Float[Array, " out"] | None = None,
    adapter: Adapter | None = None,
) -> Float[Array, "*batch out"]:
    """Forms x W^T + b + scale (x A^T) B^T in x's dtype; the sum is formed in float32 and rounded once.

    Source: torch.nn.Linear's layout; Hu et al. 2021, equation 3.
    """
    return finish_linear(contract(x, weight), x, bias, adapter)


def finish_linear(y: Array, x: Array, bias: Array | None, adapter: Adapter | None) -> Array:
    """The rest of `linear`, given the product y = x W^T in float32: adds bias and adapter and rounds once."""
    if bias is not None:
        y += bias
    if adapter is not None:
        y += low_rank(x if adapter.dropout is None else adapter.dropout(x), *adapter.factors())
    return y.astype(x.dtype)


class LinearMap(NamedTuple):
    """One layer's linear map. `weight` is its own [out, in], or a frozen stack of which `layer` is the index."""

    weight: Float[Array, "out inner"] | Float[Array, "L out inner"] | QuantizedStack
    layer: Int[Array, ""] | int | None  # None: `weight` is the layer's own
    bias: Float[Array, " out"] | None
    adapter: Adapter | None


def linears(x: Float[Array, "*batch inner"], *maps: LinearMap) -> list[Float[Array, "*batch _"]]:
    """Several maps of one input; where the kernel runs, frozen maps share a backward pass (`projections`)."""
    stacks: list[Any] = [each.weight for each in maps if each.layer is not None]
    layer, adapters = maps[0].layer, [each.adapter for each in maps]
    if layer is not None and len(stacks) == len(maps) and projections.unsupported(x, stacks, adapters) is None:
        biases = [each.bias for each in maps]
        return projections.frozen_linears(x, stacks, layer, biases, adapters)
    if layer is not None and len(stacks) == len(maps) and _few_rows(x, stacks) is not None:
        # Without bias and adapter the kernel itself rounds, which saves a launch.
        rounded = all(each.bias is None and each.adapter is None for each in maps)
        dtype = x.dtype if rounded else jnp.float32
        flat = x.reshape(-1, x.shape[-1])
        ys: Any = few_products(flat, tuple(stacks), jnp.asarray(layer, jnp.int32), jnp.dtype(dtype))
        ys = [y.reshape(*x.shape[:-1], -1) for y in ys]
        return [finish_linear(y, x, each.bias, each.adapter) for y, each in zip(ys, maps, strict=True)]
    return [_single(x, each) for each in maps]


def _single(x: Array, each: LinearMap) -> Array:
    weight, layer, bias, adapter = each
    if isinstance(weight, QuantizedStack):
        y: Array = quantized_product(x, weight, layer)
        return finish_linear(y, x, bias, adapter)
    return linear(x, weight if layer is None else layer_slice(weight, layer), bias, adapter)


def layer_slice(stack: Array, slot: Array | int) -> Array:
    """Layer `slot` of a stacked parameter; the stack itself stays where it is."""
    return jax.lax.dynamic_index_in_dim(stack, slot, keepdims=False)


def _few_rows(x: Array, stacks: Sequence[Any]) -> FewRows | None:
    """The implementation of products of few rows, if x has few and it is faster for them than a plain product."""
    kernel: FewRows = choose("few_rows", x.dtype, *stacks).value
    return kernel if kernel.shares_launch and x.size // x.shape[-1] <= kernel.most_rows(*stacks) else None


def logits_of_few(
    x: Float[Array, "M inner"], stack: Float[Array, "L out inner"], layer: Int[Array, ""] | int
) -> Float[Array, "M out"]:
    """Forms x W^T in float32 with W = stack[layer], in x's dtype; there is no backward pass."""
    x = x.astype(stack.dtype)
    if (kernel := _few_rows(x, [stack])) is None:
        return contract(x, layer_slice(stack, layer))
    # So narrow a matrix stays in the cache: it may be read again for each row, by many more programs.
    rows = Rows.of_layer(x.shape[0], layer)._replace(separate=True)
    return kernel.products(x, [stack], rows, jnp.float32)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def few_products(
    x: Float[Array, "M inner"], stacks: tuple[Array | QuantizedStack, ...], layer: Int[Array, ""], dtype: Any
) -> tuple[Float[Array, "M _"], ...]:
    """Forms x W^T for each W = stack[layer], which are frozen, by the implementation for few rows.

    Sums are float32 and rounded once, to `dtype`.
    """
    kernel: FewRows = choose("few_rows", x.dtype, *stacks).value
    return tuple(kernel.products(x, stacks, Rows.of_layer(x.shape[0], layer), dtype))


def _few_products_forward(x: Array, stacks: tuple[Any, ...], layer: Array, dtype: Any):
    return tuple(contract(x, stack[layer]).astype(dtype) for stack in stacks), (x, stacks, layer)


def _few_products_backward(
    _dtype: Any, residuals: tuple[Any, ...], d_ys: tuple[Array, ...]
) -> tuple[Array, None, None]:
    x, stacks, layer = residuals
    d_x = sum(product("mo,oi->mi", d_y, stack[layer]) for d_y, stack in zip(d_ys, stacks, strict=True))
    return jnp.asarray(d_x).astype(x.dtype), None, None


define_vjp(few_products, _few_products_forward, _few_products_backward, frozen={1: "projections"})


@jax.custom_vjp
def quantized_product(
    x: Float[Array, "*batch inner"], stack: QuantizedStack, group: Int[Array, ""]
) -> Float[Array, "*batch out"]:
    """Forms x W^T in float32 with W = stack[group], which is frozen.

    The backward pass decodes W again: it keeps the stack, whatever the recomputation policy.
    """
    return contract(x, stack[group])


def _quantized_product_forward(
    x: Array, stack: QuantizedStack, group: Array
) -> tuple[Array, tuple[QuantizedStack, Array]]:
    return quantized_product(x, stack, group), (stack, group)


def _quantized_product_backward(residuals: tuple[QuantizedStack, Array], d_y: Array) -> tuple[Array, None, None]:
    stack, group = residuals
    d_x = product("...o,oi->...i", d_y.astype(stack.dtype), stack[group])  # rounded for the reason given in `contract`
    return d_x.astype(stack.dtype), None, None


define_vjp(quantized_product, _quantized_product_forward, _quantized_product_backward, frozen={1: "quantised weights"})
