"""Linear maps whose frozen weight lies in a stack of layers and is read there: one product, adapter included.

On Hopper the expert kernel does this too, with one group of rows: it indexes the stack in place, adds the low-rank term
in the same accumulators and rounds once, where XLA would copy the layer's weight out of the stack and write a float32
result to memory for the adapter to be added to.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxmoe.ops.experts import implementation
from jaxmoe.ops.linear import PROJECTED, Adapter, fold, two_terms, unfold

_RANK_MULTIPLE = 64  # what the kernel's low-rank term is padded to
MIN_ROWS = 512  # below, a product reads the weight only once anyway and XLA's is as good


def takes(x: Float[Array, "*batch inner"], stack: Float[Array, "L out inner"]) -> bool:
    """Whether `frozen_linears` runs on this device for these sizes."""
    rows = x.size // x.shape[-1]
    fits = rows >= MIN_ROWS and rows % 8 == 0 and all(size % 64 == 0 for size in stack.shape[1:])
    return fits and x.dtype == stack.dtype and implementation(x.dtype).name == "mosaic"


def frozen_linears(
    x: Float[Array, "*batch inner"],
    stacks: Sequence[Float[Array, "L _ inner"]],
    layer: Int[Array, ""] | int,
    biases: Sequence[Float[Array, " _"] | None],
    adapters: Sequence[Adapter | None],
) -> list[Float[Array, "*batch _"]]:
    """Forms x W^T + b + scale (x A^T) B^T for each W = stack[layer], in float32, rounded once; W gets no gradient.

    The gradient of x is summed over the maps in the same accumulators; their low-rank rows are formed in one product.
    """
    pairs = tuple(adapter and (adapter.lora_A, adapter.scale * adapter.lora_B) for adapter in adapters)
    ys = _products(x.reshape(-1, x.shape[-1]), tuple(stacks), jnp.asarray(layer, jnp.int32), pairs)
    ys = [y if b is None else (y.astype(jnp.float32) + b).astype(y.dtype) for y, b in zip(ys, biases, strict=True)]
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


_Pair = tuple[Array, Array]  # A and scale * B, float32


@jax.custom_vjp
def _products(x: Array, stacks: tuple[Array, ...], layer: Any, adapters: tuple[_Pair | None, ...]) -> tuple[Array, ...]:
    return _products_forward(x, stacks, layer, adapters)[0]


def _multiply(x: Array, stack: Array, layer: Any, **options: Any) -> Array:
    """The kernel's product of all rows with one layer of the stack."""
    from jaxmoe.ops.kernels.grouped_matmul import hopper as kernel

    count = -(-x.shape[0] // kernel.SMALL)
    units = kernel.SMALL // kernel.TILE_ROWS
    index = jnp.arange(count, dtype=jnp.int32)
    blocks = kernel.Blocks(units * index, jnp.full_like(index, units), jnp.zeros_like(index), jnp.int32(count))
    # Every block has all its rows (those past the end are not written): one program to compile.
    tiles = kernel.default_tiles(stack.shape[1 if options["transposed"] else 2])._replace(heights=(kernel.SMALL,))
    return kernel.grouped_matmul(x, stack, blocks, layer, tiles=tiles, **options)


def _padded(array: Array, axis: int) -> Array:
    """Lengthened to a multiple of what the kernel takes as a rank: two terms are free up to a rank of 32."""
    extra = -array.shape[axis] % _RANK_MULTIPLE
    return jnp.pad(array, [(0, extra if i == axis else 0) for i in range(array.ndim)])


def _dot(equation: str, a: Array, b: Array) -> Array:
    """In float32: with a 16-bit result XLA may split a long sum and add the parts in 16 bits."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _split(array: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    return jnp.split(array, list(accumulate(sizes))[:-1], axis)


def _terms(pairs: Sequence[_Pair], dtype: Any) -> Array:
    """The two terms of every A, one behind the other [sum of 2r, inner]."""
    return jnp.concatenate([two_terms(a, dtype, 0) for a, _ in pairs])


def _low_rows(x: Array, pairs: Sequence[_Pair]) -> list[Array]:
    """The rows x A^T of every adapter, which a policy keeps with the projections that they are part of."""
    ranks = [a.shape[0] for a, _ in pairs]
    rows = _split(_dot("mi,ri->mr", x, _terms(pairs, x.dtype)), [2 * r for r in ranks], 1)
    folded = [fold(part, r).astype(x.dtype) for part, r in zip(rows, ranks, strict=True)]
    return [checkpoint_name(part, PROJECTED) for part in folded]


def _products_forward(x: Array, stacks: tuple[Array, ...], layer: Any, adapters: tuple[_Pair | None, ...]):
    pairs = [pair for pair in adapters if pair is not None]
    low_rows = _low_rows(x, pairs) if pairs else []
    low = iter(low_rows)
    ys = []
    for stack, pair in zip(stacks, adapters, strict=True):
        options: dict[str, Any] = {}
        if pair is not None:
            b = _padded(two_terms(pair[1], x.dtype, 1), 1)
            options = {"low": unfold(next(low), b.shape[1]), "low_weight": b[None]}
        ys.append(_multiply(x, stack, layer, transposed=True, **options))
    return tuple(ys), (x, stacks, layer, adapters, low_rows)


def _products_backward(residuals: tuple[Any, ...], d_ys: tuple[Array, ...]):
    x, stacks, layer, adapters, low = residuals
    others = list(zip(d_ys, stacks, strict=True))[1:]
    multiply = partial(_multiply, d_ys[0], stacks[0], layer, transposed=False, others=others)
    adapted = [(d_y, pair) for d_y, pair in zip(d_ys, adapters, strict=True) if pair is not None]
    if not adapted:
        return multiply(), None, None, None
    pairs = [pair for _, pair in adapted]
    ranks = [a.shape[0] for a, _ in pairs]
    d_low = [
        fold(_dot("mo,or->mr", d_y, two_terms(b, x.dtype, 1)), r).astype(x.dtype)
        for (d_y, (_, b)), r in zip(adapted, ranks, strict=True)
    ]
    twice = jnp.concatenate([unfold(rows, 2 * r) for rows, r in zip(d_low, ranks, strict=True)], 1)
    d_x = multiply(low=_padded(twice, 1), low_weight=_padded(_terms(pairs, x.dtype), 0)[None])
    d_a = _split(_dot("mr,mi->ri", jnp.concatenate(d_low, 1), x), ranks, 0)
    gradients = iter(
        (a_part.astype(a.dtype), _dot("mo,mr->or", d_y, rows).astype(b.dtype))
        for a_part, (d_y, (a, b)), rows in zip(d_a, adapted, low, strict=True)
    )
    return d_x, None, None, tuple(None if pair is None else next(gradients) for pair in adapters)


_products.defvjp(_products_forward, _products_backward)
