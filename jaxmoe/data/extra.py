"""Libraries that only some forms of data need: the extra `data` of this package."""

from __future__ import annotations

import importlib
from typing import Any

from jaxmoe.errors import UserError


def library(name: str, purpose: str) -> Any:
    """The module `name`; `purpose` starts the error.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        found = "none" if isinstance(error, ModuleNotFoundError) and error.name == name else f"one that fails ({error})"
        raise UserError(
            f"{purpose}: expected the package {name}, found {found}; install this package's extra data, "
            f"or run pip install {name}"
        ) from None
