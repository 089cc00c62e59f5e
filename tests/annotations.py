"""The checker of array annotations that the suite installs: beartype that accepts an int as a float (PEP 484)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked at every call.

    `jaxmoe.config` and `jaxmoe.lora` are not checked: they receive users' values, and raise their own errors for wrong
    types.
    """
    return function if function.__module__ in ("jaxmoe.config", "jaxmoe.lora") else _checked(function)
