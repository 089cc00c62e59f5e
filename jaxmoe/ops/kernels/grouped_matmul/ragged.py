"""The grouped products by `jax.lax.ragged_dot`, in any dtype: whatever XLA makes of it on the device at hand.

On a GPU with cuDNN 9.22 or newer that is a kernel of cuDNN. With an older one, and on a CPU, XLA builds temporaries of
[rows, experts, ...], which a model of real size has no memory for. So it is selected by name only, and
`python -m benchmarks.grouped_matmul` compares it with the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers, ragged_dot_general
from jaxtyping import Array, Int

from jaxmoe.ops.contraction import PRECISION
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.schedule import Schedule
from jaxmoe.ops.swiglu import swiglu_of_product
from jaxmoe.quantized_stack import QuantizedStack

_TILE_ROWS = 16  # as in the kernels' layout
_product = partial(ragged_dot_general, precision=PRECISION, preferred_element_type=jnp.float32)


class Ragged:
    """The implementation "ragged_dot" of the grouped products."""

    rank_multiple = 1
    min_linear_rows = None
    linear_decodes = False

    def unsupported(self, dtype: Any, *widths: int) -> str | None:
        """None: it runs anywhere."""
        return None

    def tile_rows(self, routed_rows: int, num_experts: int) -> int:
        """16 for any load."""
        return _TILE_ROWS

    def span_rows(self, routed_rows: int, num_experts: int) -> tuple[int, ...]:
        """Empty: it reads the groups' sizes, not spans."""
        return ()

    def matmul(
        self,
        x: Array,
        weight: Array | QuantizedStack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool = False,
        low: LowRankTerm | None = None,
    ) -> Array:
        """As `GroupedMatmul.matmul`."""
        groups = schedule.first_tile.shape[0]
        if isinstance(weight, QuantizedStack):
            weight = weight[offset + jnp.arange(groups)]
        else:
            weight = jax.lax.dynamic_slice_in_dim(weight, offset, groups)
        numbers = RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), (0,), (0,))
        by_group = partial(_product, group_sizes=_group_sizes(schedule), ragged_dot_dimension_numbers=numbers)
        y: Array = by_group(x, weight)
        if low is not None:
            y += by_group(*low)
        y = y.astype(x.dtype)
        return swiglu_of_product(y) if swiglu else y

    def outer(self, left: Array, right: Array, schedule: Schedule) -> Array:
        """As `GroupedMatmul.outer`."""
        numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        return _product(left, right, _group_sizes(schedule), numbers)

    def linear(self, *_: Any, **__: Any) -> Array:
        """Not offered: a plain product already reads a weight only once."""
        raise AssertionError("min_linear_rows is None")


def _group_sizes(schedule: Schedule) -> Int[Array, " E"]:
    """Rows of each group with its padding; groups lie one after the other."""
    return schedule.tile_count * _TILE_ROWS


RAGGED = Ragged()
