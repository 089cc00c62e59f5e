"""Grouped matmul (rows sorted by expert, times the expert's own matrix), and what each implementation has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from jaxmoe.ops.schedule import Schedule
from jaxmoe.quantized_stack import QuantizedStack


class LowRankTerm(NamedTuple):
    """A low-rank term that joins a product before it is rounded: rows [P, rank] times `weight` of the row's group."""

    rows: Float[Array, "P rank"]
    weight: Float[Array, "groups _ _"]


@runtime_checkable
class GroupedMatmul(Protocol):
    """One implementation of the grouped products, with its sizes."""

    rank_multiple: int  # an adapter's rank is padded to a multiple of this
    min_linear_rows: int | None  # `linear` is faster from this many rows on; None: it has no `linear`
    linear_decodes: bool  # `linear` is for quantised stacks, too

    def unsupported(self, dtype: Any, *widths: int) -> str | None:
        """Why it cannot run on 16-bit or float32 rows of these widths, or None."""
        ...

    def tile_rows(self, routed_rows: int, num_experts: int) -> int:
        """Rows of a tile of the layout."""
        ...

    def span_rows(self, routed_rows: int, num_experts: int) -> tuple[int, ...]:
        """The heights, in rows, for which the schedule lists spans; empty if it reads none."""
        ...

    def matmul(
        self,
        x: Float[Array, "P inner"],
        weight: Array | QuantizedStack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool = False,
        low: LowRankTerm | None = None,
    ) -> Float[Array, "P out"]:
        """Rows times weight[offset + the row's expert], plus a low-rank term, summed in float32, rounded once.

        Args:
            x: rows laid out by `schedule`.
            weight: [groups, out, inner], contracted over `inner` if `transposed` (x W^T); else [groups, inner, out].
            schedule: the layout.
            offset: index of expert 0 in `weight`.
            transposed: which of the two.
            swiglu: the product is that of gate and up; SwiGLU of it is returned, [P, F].
            low: a low-rank term by expert; `weight`'s offset does not apply to it.
        """
        ...

    def outer(self, left: Float[Array, "P A"], right: Float[Array, "P C"], schedule: Schedule) -> Float[Array, "E A C"]:
        """For each expert the sum over its rows of left[row]^T right[row], float32; one of them is zero at padding."""
        ...

    def linear(
        self,
        x: Float[Array, "M inner"],
        stack: Float[Array, "L _ _"],
        layer: Int[Array, ""],
        *,
        transposed: bool,
        others: Sequence[tuple[Array, Array]] = (),
        low: LowRankTerm | None = None,
    ) -> Float[Array, "M out"]:
        """All rows times one layer of a frozen stack (x W^T if `transposed`, else x W), rounded once.

        Only called if `min_linear_rows` is a number. The products of `others`, pairs such as (x, stack), are added in
        the same accumulators.
        """
        ...
