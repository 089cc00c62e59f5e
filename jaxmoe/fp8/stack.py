"""FP8 on the device: a stack of weights that is decoded where it is indexed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmoe.parameters import FP8_BLOCK
from jaxmoe.quantized_stack import QuantizedStack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP8Stack(QuantizedStack):
    """A `QuantizedStack` in FP8: codes e4m3 [groups, out, in], scales [groups, matrices, rows, columns].

    A group holds one matrix or several, one below the other, each with blocks of its own.
    """

    form: ClassVar[str] = "FP8"
    # JAX stores placeholders here while it flattens trees, so annotations of arrays would not hold.
    codes: Any
    scales: Any
    shape: tuple[int, ...] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    weight: Any = None
    places: Any = None

    @classmethod
    def of(cls, params: Mapping[str, Array], path: str, shape: tuple[int, ...], dtype: Any) -> FP8Stack:
        """The weight `path` of a flat dictionary; `shape` [groups, out, in] may join its leading axes."""

        def joined(name: str, trailing: int) -> Array | None:
            array = params.get(f"{path}.{name}")
            return None if array is None else array.reshape(-1, *array.shape[array.ndim - trailing :])

        arrays = joined("codes", 2), joined("scales", 3)
        return cls(*arrays, shape, jnp.dtype(dtype), joined("weight", 2), params.get(f"{path}.places"))

    def _decoded(self, group: Any) -> Array:
        with jax.named_scope("fp8_decode"):
            codes, scales = (x.at[group].get(mode="promise_in_bounds") for x in (self.codes, self.scales))
            matrices = scales.shape[-3]
            by_matrix = codes.reshape(*codes.shape[:-2], matrices, -1, codes.shape[-1]).astype(jnp.float32)
            weights = by_matrix * spread(scales.astype(jnp.float32), by_matrix.shape[-2:])
            return weights.astype(self.dtype).reshape(codes.shape)


def spread(grid: Array, sides: tuple[int, ...]) -> Array:
    """The values of blocks [..., rows, columns] at each element [..., out, in] of matrices with these sides."""
    out, inner = sides
    rows = jnp.repeat(grid, FP8_BLOCK, axis=-2)[..., :out, :]
    return jnp.repeat(rows, FP8_BLOCK, axis=-1)[..., :inner]
