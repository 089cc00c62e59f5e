"""How the Hopper kernel multiplies rows by experts in FP8 forwards: decoded to 16 bits first, or as they are."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.ops.schedule import Schedule


@runtime_checkable
class FP8Products(Protocol):
    """One implementation of x W^T for grouped rows and a stack in FP8."""

    multiplies: bool  # False: the stack is decoded, and the products are those of 16-bit weights

    def unsupported(self, dtype: Any, stack: FP8Stack) -> str | None:
        """Why it cannot multiply rows of this dtype with this stack, or None."""
        ...

    def matmul(
        self, x: Float[Array, "P inner"], stack: FP8Stack, schedule: Schedule, offset: Any, *, swiglu: bool
    ) -> Float[Array, "P out"]:
        """As `GroupedMatmul.matmul` with `transposed`; the rows are quantised on the way."""
        ...


class Decoded:
    """The implementation "decoded": the numbers are those of the decoded weights."""

    multiplies = False

    def unsupported(self, dtype: Any, stack: FP8Stack) -> str | None:
        """None: it runs anywhere."""
        return None

    def matmul(self, *_: Any, **__: Any) -> Array:
        """Not offered."""
        raise AssertionError("multiplies is False")


DECODED = Decoded()
