"""How the Hopper kernel multiplies rows by experts in NF4: decoded for each product, or in the kernel itself."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.schedule import Schedule


@runtime_checkable
class NF4Products(Protocol):
    """One implementation of x W^T and x W for grouped rows and a stack in NF4."""

    multiplies: bool  # False: the stack is decoded, and the products are those of 16-bit weights

    def unsupported(self, dtype: Any, stack: NF4Stack) -> str | None:
        """Why it cannot multiply rows of this dtype with this stack, or None."""
        ...

    def matmul(
        self, x: Array, stack: NF4Stack, schedule: Schedule, offset: Any, *, transposed: bool
    ) -> Float[Array, "P out"]:
        """As `GroupedMatmul.matmul`, without SwiGLU and low-rank terms."""
        ...


class Decoded:
    """The implementation "decoded"."""

    multiplies = False

    def unsupported(self, dtype: Any, stack: NF4Stack) -> str | None:
        """None: it runs anywhere."""
        return None

    def matmul(
        self, x: Array, stack: NF4Stack, schedule: Schedule, offset: Any, *, transposed: bool
    ) -> Float[Array, "P out"]:
        """Not offered."""
        raise AssertionError("multiplies is False")


DECODED = Decoded()
