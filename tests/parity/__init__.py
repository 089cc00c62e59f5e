"""Parity: transformers, torch_ref, jaxmoe and a float64 oracle on the same weights, compared number by number.

`python -m tests.parity --help` is the command; `tests/parity/README.md` explains the suite. Importing this package
loads no framework: the names below, which other tests use in one process, are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.parity.batches import CHECKPOINT, LAYOUTS, LONG, Batch, checkpoint_batch, make_batch
    from tests.parity.inprocess import COMPILER_OPTIONS, ProductOutput, product
    from tests.parity.measures import relative_error

__all__ = [
    "CHECKPOINT",
    "COMPILER_OPTIONS",
    "LAYOUTS",
    "LONG",
    "Batch",
    "ProductOutput",
    "checkpoint_batch",
    "make_batch",
    "product",
    "relative_error",
]

_HOMES = {
    **dict.fromkeys(("CHECKPOINT", "LAYOUTS", "LONG", "Batch", "checkpoint_batch", "make_batch"), "batches"),
    **dict.fromkeys(("COMPILER_OPTIONS", "ProductOutput", "product"), "inprocess"),
    "relative_error": "measures",
}


def __getattr__(name: str) -> Any:
    """Imports a name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
