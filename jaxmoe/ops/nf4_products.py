"""How the Hopper kernel multiplies rows by experts in NF4: decoded for each product, or in the kernel itself."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.schedule import Schedule


@runtime_checkable
class NF4Products(Protocol):
    """One implementation of x W^T and x W for grouped rows and a stack in NF4."""

    def unsupported(self, dtype: Any, stack: NF4Stack) -> str | None:
        """Why it cannot multiply rows of this dtype with this stack, or None."""
        ...

    def faster(self, schedule: Schedule, low: LowRankTerm | None, *, swiglu: bool) -> bool:
        """Whether `matmul` is faster, for so many rows and this term, than decoding a layer's experts first."""
        ...

    def matmul(
        self,
        x: Array,
        stack: NF4Stack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool,
        low: LowRankTerm | None,
    ) -> Float[Array, "P out"]:
        """As `GroupedMatmul.matmul`."""
        ...


class Decoded:
    """The implementation "decoded": the products are those of 16-bit weights."""

    def unsupported(self, dtype: Any, stack: NF4Stack) -> str | None:
        """None: it runs anywhere."""
        return None

    def faster(self, schedule: Schedule, low: LowRankTerm | None, *, swiglu: bool) -> bool:
        """False: it offers no product."""
        return False

    def matmul(
        self,
        x: Array,
        stack: NF4Stack,
        schedule: Schedule,
        offset: Any,
        *,
        transposed: bool,
        swiglu: bool,
        low: LowRankTerm | None,
    ) -> Float[Array, "P out"]:
        """Not offered."""
        raise AssertionError("it is never faster")


DECODED = Decoded()
