"""The exceptions that mean "the user, or the user's file, is at fault", and two checks that raise them."""

from __future__ import annotations

import math
from typing import Any


class UserError(ValueError):
    """Bad input or a bad option: one line that names the thing, what was expected and what was found.

    `jaxmoe.cli.arguments.run` turns it into that line on stderr and exit code 2; every other exception is a bug.
    """


class ConfigError(UserError):
    """A config.json or adapter_config.json that is not supported; the message names field, expected, found."""


def check_integer(name: str, value: Any, *, at_least: int) -> int:
    """`value`, when it is a whole number of at least `at_least`; else raises ConfigError, which says `name`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ConfigError(f"{name}: expected a whole number of at least {at_least}, found {value!r}")
    return value


def check_number(name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> None:
    """Raises ConfigError, which says `name`, unless `value` is a finite number within the bound."""
    bad = isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)
    if not bad and at_least is not None and value < at_least:
        bad = True
    if not bad and above is not None and value <= above:
        bad = True
    if bad:
        bound = f" of at least {at_least}" if at_least is not None else f" above {above}" if above is not None else ""
        raise ConfigError(f"{name}: expected a number{bound}, found {value!r}")
