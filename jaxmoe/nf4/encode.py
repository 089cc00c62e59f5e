"""Encodes matrices into NF4 on any device, by XLA, with the bytes of `jaxmoe.nf4.codec.encode`.

Every step gives the same bits on every device. Reciprocals come from integer arithmetic, since XLA's float32 division
on a GPU may be off by a unit in the last place. No product is followed by a sum, so none is fused into a multiply-add.
The mean of absmax is the host's, in float64.

Blocks whose absmax is neither zero nor of ordinary size may meet subnormal numbers, which XLA flushes to zero on a CPU.
The codec encodes their matrices, and those whose last block is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8, UInt32

from jaxmoe.nf4 import codec
from jaxmoe.nf4.codec import NF4, NF4_TABLE
from jaxmoe.parameters import NF4_BLOCK, NF4_NESTED_BLOCK

_BOUNDS = (NF4_TABLE[:-1] + NF4_TABLE[1:]) / np.float32(2)
_SMALLEST, _LARGEST = np.float32(2.0**-64), np.float32(2.0**64)  # of ordinary size: all that follows stays normal
_MANTISSA, _IMPLICIT, _MAGNITUDE = 0x7FFFFF, 0x800000, 0x7FFFFFFF
_FEWEST = 2**18  # elements of a matrix; smaller ones are encoded by the codec before XLA has compiled its code


def encode(matrices: Sequence[np.ndarray], nested_quant_map: np.ndarray | None = None) -> NF4:
    """Quantises contiguous matrices of one size and dtype, as `codec.encode` does each of them.

    The arrays have a leading axis [matrices]. They are on the default device, or in NumPy if the codec encoded them.
    """
    first = matrices[0]
    if first.size % NF4_BLOCK or first.size < _FEWEST:
        return _by_codec(matrices, nested_quant_map)
    words = [matrix.reshape(-1).view(np.uint32) for matrix in matrices]
    codes, absmax = _encode(words, first.dtype.name)
    found = np.asarray(absmax)
    if not np.all((found == 0) | ((found >= _SMALLEST) & (found < _LARGEST))):
        return _by_codec(matrices, nested_quant_map)
    if nested_quant_map is None:
        return NF4._make((codes, absmax, None, None))
    offset = np.stack([codec.mean(each) for each in found])
    return NF4._make((codes, *_encode_absmax(absmax, offset, nested_quant_map), offset))


def _by_codec(matrices: Sequence[np.ndarray], nested_quant_map: np.ndarray | None) -> NF4:
    packed = [codec.encode(matrix, nested_quant_map) for matrix in matrices]
    return NF4._make(None if part[0] is None else np.stack(part) for part in zip(*packed, strict=True))


@partial(jax.jit, static_argnums=1)
def _encode(
    words: Sequence[UInt32[Array, " w"]], dtype: str
) -> tuple[UInt8[Array, "m bytes"], Float[Array, "m blocks"]]:
    """(codes, absmax) of matrices of the same size; a word holds two elements of 16 bits, or one of 32 bits."""
    even, odd = _pairs(jnp.stack(words), dtype)
    matrices, pairs = even.shape
    blocks = (matrices, pairs * 2 // NF4_BLOCK, NF4_BLOCK // 2)
    # magnitudes are compared as integers: they order as the floats do, and subnormal ones are not flushed
    absmax = jnp.maximum(_bits(even) & _MAGNITUDE, _bits(odd) & _MAGNITUDE).reshape(blocks).max(axis=-1)
    inverse = jnp.broadcast_to(_reciprocal(absmax)[..., None], blocks).reshape(matrices, pairs)
    codes = _nearest(even * inverse) << 4 | _nearest(odd * inverse)
    return codes.astype(jnp.uint8), _floats(absmax)


def _pairs(words: UInt32[Array, "m w"], dtype: str) -> tuple[Float[Array, "m pairs"], Float[Array, "m pairs"]]:
    """The elements of even and of odd index, in float32."""
    if dtype == "float32":
        return _floats(words[:, ::2]), _floats(words[:, 1::2])
    low, high = words & np.uint32(0xFFFF), words >> 16
    if dtype == "bfloat16":
        return _floats(low << 16), _floats(high << 16)
    halves = (lax.bitcast_convert_type(half.astype(jnp.uint16), jnp.float16) for half in (low, high))
    even, odd = (half.astype(jnp.float32) for half in halves)
    return even, odd


def _bits(x: Float[Array, "..."]) -> Int32[Array, "..."]:
    return lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: Array) -> Float[Array, "..."]:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _reciprocal(bits: Int32[Array, "..."]) -> Float[Array, "..."]:
    """1 / x to the nearest float32, for bits of normal positive x whose reciprocal is normal; 1 for zero.

    With mantissas M of x and Q of 1 / x, both of 24 bits, the residual of Q is Q*M - 2^47. Near the quotient it is
    small, so its lower 32 bits hold all of it. The nearest Q is the one whose residual is at most M / 2.
    """
    exponent, fraction = bits >> 23, bits & _MANTISSA
    mantissa = fraction | _IMPLICIT
    below_one = np.float32(1 - 2.0**-24)
    guess = jnp.minimum(1 / _floats(fraction | 0x3F800000), below_one)
    quotient = (_bits(guess) & _MANTISSA) | _IMPLICIT
    for _ in range(3):  # a guess may be off by more than one unit
        twice = 2 * (quotient * mantissa)
        quotient += (twice < -mantissa).astype(jnp.int32) - (twice > mantissa).astype(jnp.int32)
    inverse = ((253 - exponent) << 23) | (quotient & _MANTISSA)
    inverse = jnp.where(fraction == 0, (254 - exponent) << 23, inverse)  # a power of two
    return jnp.where(bits == 0, np.float32(1), _floats(inverse))


def _nearest(scaled: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """The index of the nearest value of the table, or of the lower of two: a search whose bounds are selected."""
    above: list[Array] = []  # from the highest bit of the index to the lowest
    for step in (8, 4, 2, 1):
        above.append(scaled > _selected(above, _BOUNDS[step - 1 :: 2 * step]))
    index = above[0].astype(jnp.uint32)
    for bit in above[1:]:
        index = index << 1 | bit.astype(jnp.uint32)
    return index


def _selected(bits: Sequence[Array], values: np.ndarray) -> Array | np.float32:
    """values[index], for the index with these bits, the highest first."""
    if not bits:
        return values[0]
    middle = len(values) // 2
    return jnp.where(bits[0], _selected(bits[1:], values[middle:]), _selected(bits[1:], values[:middle]))


@jax.jit
def _encode_absmax(
    absmax: Float[Array, "m blocks"], offset: Float[Array, " m"], table: Float[Array, " 256"]
) -> tuple[UInt8[Array, "m blocks"], Float[Array, "m outer"]]:
    """The second quantisation, with the given means: (indices, absmax of each block of 256)."""
    matrices, blocks = absmax.shape
    outer = -(-blocks // NF4_NESTED_BLOCK)
    centred = jnp.pad(absmax - offset[:, None], ((0, 0), (0, outer * NF4_NESTED_BLOCK - blocks)))
    centred = centred.reshape(matrices, outer, NF4_NESTED_BLOCK)
    largest = jnp.abs(centred).max(axis=-1)
    scaled = centred * _reciprocal(_bits(largest))[..., None]
    bounds = (table[:-1] + table[1:]) / 2
    indices = jnp.zeros(scaled.shape, jnp.int32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):  # a search among 255 bounds
        indices += jnp.where(scaled > bounds.at[indices + step - 1].get(mode="promise_in_bounds"), step, 0)
    return indices.astype(jnp.uint8).reshape(matrices, -1)[:, :blocks], largest
