"""The residual sum and the norm after it, for tokens whose gradient nobody asks for."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from jaxmoe.ops.implementations import choose
from jaxmoe.ops.norm import StackedNorm, rms_norm


def add_and_norm(
    h: Float[Array, "*batch D"], update: Float[Array, "*batch D"] | None, norm: StackedNorm, dtype: Any
) -> tuple[Float[Array, "*batch D"], Float[Array, "*batch D"]]:
    """(h + update in float32, its RMSNorm rounded once to `dtype`); without an update h is returned as it is.

    There is no backward pass.
    """
    return choose("residual_norm", h).value(h, update, norm, dtype)


class TwoSteps:
    """The implementation "xla"."""

    def unsupported(self, h: Any) -> str | None:
        """None: it runs anywhere."""
        return None

    def __call__(self, h: Array, update: Array | None, norm: StackedNorm, dtype: Any) -> tuple[Array, Array]:
        """As `add_and_norm`."""
        h = h if update is None else h + update
        return h, rms_norm(h, norm.weight, norm.eps).astype(dtype)


TWO_STEPS = TwoSteps()
