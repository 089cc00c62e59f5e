"""Text generation: `python -m jaxmoe.generate --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.lazy import exports

if TYPE_CHECKING:
    from jaxmoe.generate.engine import Generator
    from jaxmoe.generate.sampling import Sampling

__all__ = ["Generator", "Sampling"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Generator": "jaxmoe.generate.engine",
        "Sampling": "jaxmoe.generate.sampling",
    },
)
