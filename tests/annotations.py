"""The checker of array annotations that the suite installs: beartype that takes an int for a float, as PEP 484 says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations checked at every call.

    `jaxmoe.config` and `jaxmoe.lora` are left alone: users' values arrive there, and those modules raise errors of
    their own for wrong types.
    """
    return function if function.__module__ in ("jaxmoe.config", "jaxmoe.lora") else _checked(function)
