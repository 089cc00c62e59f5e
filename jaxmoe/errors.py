"""The errors that a user can fix (a wrong option, a bad file), two checks that raise them, and how text from files is
shown."""

from __future__ import annotations

import math
import re
from typing import Any


class UserError(ValueError):
    """Bad input or a bad option. The message is one line: the file or field, what was expected and what was found.

    `jaxmoe.cli.arguments.run` prints that line on stderr and exits with code 2. Every other exception is a bug.
    """


class ConfigError(UserError):
    """A config.json or adapter_config.json that is not supported; the message names field, expected, found."""


def check_integer(name: str, value: Any, *, at_least: int) -> int:
    """Returns `value`, or raises ConfigError with `name` unless it is a whole number of at least `at_least`.

    A number beyond 63 bits is refused too: no array has such an axis.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**63:
        raise ConfigError(f"{name}: expected a whole number of at least {at_least}, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """`repr(value)`, at most 300 characters of it, for a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # Python writes no integer of thousands of digits
        text = f"{type(value).__name__} of great size"
    return text if len(text) <= 300 else text[:297] + "..."


def in_words(value: Any) -> str:
    """A setting for a message: "none" for None, the items of a list, and `shown(value)` for everything else."""
    if isinstance(value, list | tuple) and value:
        return ", ".join(map(in_words, value))
    return "none" if value is None or value == [] else shown(value)


def counted(count: int, thing: str) -> str:
    """A number of things: "1 record", "2,000 records"."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


# What a terminal obeys or hides: control characters other than tabs and line ends, and changes of direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with the characters that a terminal would obey as escapes: for names and texts of strangers."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_finite(value: Any) -> bool:
    """Whether `value` is a number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_number(name: str, value: Any, *, at_least: float | None = None, above: float | None = None) -> None:
    """Raises ConfigError with `name` unless `value` is a finite number, at least `at_least` and above `above`."""
    bad = not is_finite(value)
    if not bad and at_least is not None and value < at_least:
        bad = True
    if not bad and above is not None and value <= above:
        bad = True
    if bad:
        bound = f" of at least {at_least}" if at_least is not None else f" above {above}" if above is not None else ""
        raise ConfigError(f"{name}: expected a number{bound}, found {shown(value)}")
