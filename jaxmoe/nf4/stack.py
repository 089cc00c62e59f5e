"""NF4 on the device: a stack of weights that is decoded where it is indexed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmoe.nf4.codec import NF4_TABLE
from jaxmoe.parameters import NESTED_QUANT_MAP, NF4_BLOCK, NF4_NESTED_BLOCK
from jaxmoe.quantized_stack import QuantizedStack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Stack(QuantizedStack):
    """A `QuantizedStack` in NF4.

    A group holds the codes of one matrix or of several that follow each other. The fields are those of
    `jaxmoe.nf4.codec.NF4`, codes uint8 [groups, matrices, bytes] and so on, and the table float32 [256].
    """

    form: ClassVar[str] = "NF4"

    # JAX stores placeholders here while it flattens trees, so annotations of arrays would not hold.
    codes: Any
    absmax: Any
    nested_absmax: Any
    nested_offset: Any
    nested_quant_map: Any
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    weight: Any = None
    places: Any = None

    @classmethod
    def of(cls, params: Mapping[str, Array], path: str, shape: tuple[int, ...], dtype: Any) -> NF4Stack:
        """The weight `path` of a flat dictionary; `shape` [groups, out, in] may join its leading axes."""

        def joined(name: str, trailing: int) -> Array | None:
            array = params.get(f"{path}.{name}")
            return None if array is None else array.reshape(-1, *array.shape[array.ndim - trailing :])

        codes, absmax = joined("codes", 2), joined("absmax", 2)
        assert codes is not None and absmax is not None
        nested = joined("nested_absmax", 2), joined("nested_offset", 1), params.get(NESTED_QUANT_MAP)
        mixed = joined("weight", 2), params.get(f"{path}.places")
        return cls(codes, absmax, *nested, shape, jnp.dtype(dtype), *mixed)

    def scales(self, group: Any) -> Array:
        """The absmax of every block of quantised groups, float32 [..., matrices, blocks]."""
        absmax = _at(self.absmax, group)
        if self.nested_absmax is None:
            return absmax
        nested = _at(self.nested_absmax, group), _at(self.nested_offset, group)
        return _decode_absmax(absmax, *nested, self.nested_quant_map)

    def _decoded(self, group: Any) -> Array:
        with jax.named_scope("nf4_decode"):
            absmax, codes = self.scales(group), _at(self.codes, group)
            *_, out, inner = self.shape
            elements = out * inner // codes.shape[-2]
            weights = _decode(codes, absmax, elements, self.dtype)
            return weights.reshape(*weights.shape[:-2], out, inner)


def _at(array: Array, group: Any) -> Array:
    return array.at[group].get(mode="promise_in_bounds")


def _decode(codes: Array, absmax: Array, elements: int, dtype: Any) -> Array:
    """Table value times absmax in float32, rounded once: `jaxmoe.nf4.codec.decode`, by the same steps."""
    half = NF4_BLOCK // 2
    short = absmax.shape[-1] * half - codes.shape[-1]
    if short > 0:  # the last block is short
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    blocks = codes.reshape(*absmax.shape, half)
    even, odd = ((_look_up(NF4_TABLE, code) * absmax[..., None]).astype(dtype) for code in (blocks >> 4, blocks & 15))
    return _interleaved(even, odd).reshape(*codes.shape[:-1], -1)[..., :elements]


def _interleaved(even: Array, odd: Array) -> Array:
    """The pairs [..., 2]. Two 16-bit values are written as one word, at two thirds of the time on a GPU (docs/log)."""
    if even.dtype.itemsize != 2:
        return jnp.stack([even, odd], axis=-1)
    low, high = (jax.lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in (even, odd))
    return jax.lax.bitcast_convert_type(low | high << 16, even.dtype)


def _decode_absmax(absmax: Array, nested_absmax: Array, offset: Array, table: Array) -> Array:
    outer = jnp.repeat(nested_absmax, NF4_NESTED_BLOCK, axis=-1)[..., : absmax.shape[-1]]
    # The bound changes no finite number. It separates product and sum so that no compiler fuses them into one
    # multiply-add, whose last bit would differ. An optimization barrier would not help: it is gone before LLVM runs.
    product = jnp.minimum(_look_up(table, absmax) * outer, jnp.finfo(jnp.float32).max)
    return product + offset[..., None]


def _look_up(table: Any, indices: Array) -> Array:
    return jnp.asarray(table).at[indices].get(mode="promise_in_bounds")
