"""How the Hopper kernel multiplies rows by experts in NF4 or FP8: decoded for each product, or in the kernel itself."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.schedule import Schedule
from jaxmoe.quantized_stack import QuantizedStack


@runtime_checkable
class CodedProducts(Protocol):
    """One implementation of x W^T and x W for grouped rows and a stack of codes."""

    def unsupported(self, dtype: Any, stack: QuantizedStack) -> str | None:
        """Why it cannot multiply rows of this dtype with this stack, or None."""
        ...

    def faster(self, schedule: Schedule, low: LowRankTerm | None, *, swiglu: bool) -> bool:
        """Whether, for so many 16-bit rows and this term, `matmul` is faster than decoding a layer's experts first."""
        ...

    def matmul(
        self,
        x: Float[Array, "P inner"],
        stack: QuantizedStack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool,
        low: LowRankTerm | None = None,
    ) -> Float[Array, "P out"]:
        """As `GroupedMatmul.matmul`, in the stack's dtype."""
        ...


class Decoded:
    """The implementation "decoded": the products are those of 16-bit weights."""

    def unsupported(self, dtype: Any, stack: QuantizedStack) -> str | None:
        """None: it runs anywhere."""
        return None

    def faster(self, schedule: Schedule, low: LowRankTerm | None, *, swiglu: bool) -> bool:
        """False: it offers no product."""
        return False

    def matmul(self, *_: Any, **__: Any) -> Array:
        """Not offered."""
        raise AssertionError("it is never faster")


DECODED = Decoded()
