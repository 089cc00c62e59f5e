"""Frozen linear maps that are read from their stack of layers in one product, adapter included.

The expert kernel does this with one group of rows: it indexes the stack in place, adds the low-rank term in the same
accumulators and rounds once. XLA would copy the layer's weight out of the stack, and write a float32 result to memory
for the adapter to be added to. A quantised weight is decoded for the product, forwards and backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.ops.frozen import define_vjp
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.implementations import choose
from jaxmoe.ops.kept import PROJECTED
from jaxmoe.ops.low_rank import Adapter, Factors, fold, pad_to_multiple, split_high_low, unfold
from jaxmoe.quantized_stack import QuantizedStack


def unsupported(
    x: Float[Array, "*batch inner"], stacks: Sequence[Any], adapters: Sequence[Adapter | None] = ()
) -> str | None:
    """Why `frozen_linears` cannot run on this device for these sizes, or would not be faster; None if it can."""
    if any(adapter is not None and adapter.dropout is not None for adapter in adapters):
        return "needs adapters without dropout, which gives each its own input"
    rows = x.size // x.shape[-1]
    selected = choose("grouped_matmul", x.dtype)
    least = selected.value.min_linear_rows
    if least is None:
        return f"needs a grouped matmul that offers `linear`, found {selected.name}"
    if rows < least or rows % 8:
        return f"needs a multiple of 8 rows, at least {least}, found {rows}"
    for stack in stacks:
        if isinstance(stack, QuantizedStack) and not selected.value.linear_decodes:
            return f"needs weights that are not quantised with {selected.name}, found quantised ones"
        if stack.dtype != x.dtype or any(size % 64 for size in stack.shape[1:]):
            return f"needs widths that are multiples of 64 in {x.dtype}, found {stack.shape[1:]} in {stack.dtype}"
    return None


def frozen_linears(
    x: Float[Array, "*batch inner"],
    stacks: Sequence[Float[Array, "L _ inner"] | QuantizedStack],
    layer: Int[Array, ""] | int,
    biases: Sequence[Float[Array, " _"] | None],
    adapters: Sequence[Adapter | None],
) -> list[Float[Array, "*batch _"]]:
    """Forms x W^T + b + scale (x A^T) B^T for each W = stack[layer], in float32, rounded once; W gets no gradient.

    The gradient of x is summed over the maps in the same accumulators; their low-rank rows are formed in one product.
    """
    pairs = tuple(adapter and adapter.factors() for adapter in adapters)
    ys = _products(x.reshape(-1, x.shape[-1]), tuple(stacks), jnp.asarray(layer, jnp.int32), pairs)
    ys = [y if b is None else (y.astype(jnp.float32) + b).astype(y.dtype) for y, b in zip(ys, biases, strict=True)]
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


@jax.custom_vjp
def _products(
    x: Array, stacks: tuple[Array | QuantizedStack, ...], layer: Any, adapters: tuple[Factors | None, ...]
) -> tuple[Array, ...]:
    return _products_forward(x, stacks, layer, adapters)[0]


def _dot(equation: str, a: Array, b: Array) -> Array:
    """In float32: with a 16-bit result XLA may split a long sum and add the parts in 16 bits."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _split(array: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    return jnp.split(array, list(accumulate(sizes))[:-1], axis)


def _terms(pairs: Sequence[Factors], dtype: Any) -> Array:
    """The two terms of every A, one after the other [sum of 2r, inner]."""
    return jnp.concatenate([split_high_low(a, dtype, 0) for a, _ in pairs])


def _low_rows(x: Array, pairs: Sequence[Factors]) -> list[Array]:
    """The rows x A^T of every adapter, which a policy saves with the projections that they are part of."""
    ranks = [a.shape[0] for a, _ in pairs]
    rows = _split(_dot("mi,ri->mr", x, _terms(pairs, x.dtype)), [2 * r for r in ranks], 1)
    folded = [fold(part, r).astype(x.dtype) for part, r in zip(rows, ranks, strict=True)]
    return [checkpoint_name(part, PROJECTED) for part in folded]


def _products_forward(
    x: Array, stacks: tuple[Array | QuantizedStack, ...], layer: Any, adapters: tuple[Factors | None, ...]
):
    pairs = [pair for pair in adapters if pair is not None]
    low_rows = _low_rows(x, pairs) if pairs else []
    low = iter(low_rows)
    kernel = choose("grouped_matmul", x.dtype).value
    ys = []
    for stack, pair in zip(stacks, adapters, strict=True):
        term = None
        if pair is not None:
            _, b = pair.terms(x.dtype, kernel.rank_multiple)
            term = LowRankTerm(unfold(next(low), b.shape[1]), b[None])
        ys.append(kernel.linear(x, stack, layer, transposed=True, low=term))
    return tuple(ys), (x, stacks, layer, adapters, low_rows)


def _products_backward(residuals: tuple[Any, ...], d_ys: tuple[Array, ...]):
    x, stacks, layer, adapters, low = residuals
    kernel = choose("grouped_matmul", x.dtype).value
    others = list(zip(d_ys, stacks, strict=True))[1:]
    adapted = [(d_y, pair) for d_y, pair in zip(d_ys, adapters, strict=True) if pair is not None]
    if not adapted:
        return kernel.linear(d_ys[0], stacks[0], layer, transposed=False, others=others), None, None, None
    pairs = [pair for _, pair in adapted]
    ranks = [a.shape[0] for a, _ in pairs]
    d_low = [
        fold(_dot("mo,or->mr", d_y, split_high_low(b, x.dtype, 1)), r).astype(x.dtype)
        for (d_y, (_, b)), r in zip(adapted, ranks, strict=True)
    ]
    twice = jnp.concatenate([unfold(rows, 2 * r) for rows, r in zip(d_low, ranks, strict=True)], 1)
    multiple = kernel.rank_multiple
    term = LowRankTerm(pad_to_multiple(twice, 1, multiple), pad_to_multiple(_terms(pairs, x.dtype), 0, multiple)[None])
    d_x = kernel.linear(d_ys[0], stacks[0], layer, transposed=False, others=others, low=term)
    d_a = _split(_dot("mr,mi->ri", jnp.concatenate(d_low, 1), x), ranks, 0)
    gradients = iter(
        Factors(a_part.astype(a.dtype), _dot("mo,mr->or", d_y, rows).astype(b.dtype))
        for a_part, (d_y, (a, b)), rows in zip(d_a, adapted, low, strict=True)
    )
    return d_x, None, None, tuple(None if pair is None else next(gradients) for pair in adapters)


define_vjp(_products, _products_forward, _products_backward, frozen={1: "projections"})
