"""Encodes matrices into FP8 on any device, by XLA, with the bytes of `jaxmoe.fp8.codec.encode`.

The host divides: XLA's float32 division on a GPU may be off by a unit in the last place. Blocks whose largest magnitude
is neither zero nor of ordinary size may meet subnormal numbers, which XLA flushes to zero on a CPU; the codec encodes
their matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmoe.fp8 import codec
from jaxmoe.fp8.codec import E4M3, FP8, LARGEST
from jaxmoe.fp8.stack import spread
from jaxmoe.parameters import FP8_BLOCK

_SMALLEST, _GREATEST = np.float32(2.0**-64), np.float32(2.0**64)  # of ordinary size: all that follows stays normal
_FEWEST = 2**18  # elements of a matrix; smaller ones are encoded by the codec before XLA has compiled its code


def encode(matrices: Sequence[np.ndarray], sides: tuple[int, int]) -> FP8:
    """Quantises contiguous matrices [out, in] = `sides` of one dtype, as `codec.encode` does each of them.

    The arrays have a leading axis [matrices]. The codes are on the default device, or in NumPy if the codec made them.
    """
    shaped = [matrix.reshape(sides) for matrix in matrices]
    if shaped[0].size < _FEWEST:
        return codec.encode(np.stack(shaped))
    largest = np.asarray(_largest(shaped))
    if not np.all((largest == 0) | ((largest >= _SMALLEST) & (largest < _GREATEST))):
        return codec.encode(np.stack(shaped))
    factors, scales = codec.factors_and_scales(largest)
    return FP8(_encode(shaped, factors), scales)


@jax.jit
def _largest(matrices: Sequence[Float[Array, "out inner"]]) -> Float[Array, "m rows columns"]:
    """The largest magnitude of each block, float32."""
    x = jnp.abs(jnp.stack(matrices).astype(jnp.float32))
    m, out, inner = x.shape
    x = jnp.pad(x, ((0, 0), (0, -out % FP8_BLOCK), (0, -inner % FP8_BLOCK)))
    return x.reshape(m, -1, FP8_BLOCK, x.shape[2] // FP8_BLOCK, FP8_BLOCK).max(axis=(2, 4))


@jax.jit
def _encode(matrices: Sequence[Float[Array, "out inner"]], factors: Float[Array, "m rows columns"]) -> Array:
    """The codes [m, out, in]."""
    x = jnp.stack(matrices).astype(jnp.float32)
    return jnp.clip(x * spread(factors, x.shape[1:]), -LARGEST, LARGEST).astype(E4M3)
