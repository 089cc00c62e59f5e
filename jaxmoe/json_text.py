"""The one place where JSON that others wrote is parsed: no text makes it fail with anything but a one-line error."""

from __future__ import annotations

import json
import math
import pathlib
import stat
from typing import Any

from jaxmoe.errors import ConfigError

MAX_FILE = 100 * 2**20  # bytes; the index of the largest published checkpoint has a tenth of this
MAX_DEPTH = 100  # lists and objects inside each other; errors must be able to show any part of a value

# How a file starts that Git wrote in place of a large one.
POINTER = b"version https://git-lfs.github.com/spec/"
NOT_DOWNLOADED = "a Git LFS pointer: the file was not downloaded; run git lfs pull in its folder"
LONG_NUMBER = "a whole number of thousands of digits"  # Python reads none, whatever the format


def is_pointer(content: str | bytes) -> bool:
    """Whether a file that starts like this is a pointer of Git LFS."""
    return content.startswith(POINTER) if isinstance(content, bytes) else content.startswith(POINTER.decode())


def parse_json(text: str | bytes, where: object, *, strict: bool = False) -> Any:
    """The value in a JSON text. If `strict`, what Python alone accepts is an error: NaN, Infinity, numbers too large
    for a float, and a key that stands twice in an object.

    Raises:
        ConfigError: no UTF-8, no JSON, or JSON with numbers or nesting beyond any use. The message starts with `where`.
    """
    try:
        value = json.loads(text, **_STRICT if strict else {})
    except RecursionError:
        raise ConfigError(f"{where}: expected JSON at most {MAX_DEPTH} levels deep, found more") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: expected JSON, found {_mistake(text, error)}") from None
    openings = (text.count("[") + text.count("{")) if isinstance(text, str) else (text.count(b"[") + text.count(b"{"))
    if openings > MAX_DEPTH and _depth_above(value, MAX_DEPTH):
        raise ConfigError(f"{where}: expected JSON at most {MAX_DEPTH} levels deep, found more")
    return value


# What Python's parser says -> what it found.
_MISTAKES = {
    "Expecting value": "no value",
    "Expecting ',' delimiter": "no comma and no end",
    "Expecting ':' delimiter": "no colon",
    "Expecting property name enclosed in double quotes": "no key in double quotes",
    "Extra data": "more text after the value",
    "Unterminated string starting at": "a string that does not end",
    "Invalid control character at": "a control character in a string",
    "Invalid \\escape": "an unknown escape",
    "Invalid \\uXXXX escape": "an incomplete escape",
    "Unexpected UTF-8 BOM (decode using utf-8-sig)": "a byte order mark, which JSON must not have,",
    "Illegal trailing comma before end of object": "a comma before the end",
    "Illegal trailing comma before end of array": "a comma before the end",
}


def _mistake(text: str | bytes, error: ValueError) -> str:
    """What a text that is no JSON has instead, in words, with its place."""
    if is_pointer(text):
        return NOT_DOWNLOADED
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "an empty text"
        words = _MISTAKES.get(error.msg.partition(": ")[0], error.msg)
        line = f"line {error.lineno:,}, " if "\n" in error.doc.rstrip("\n") else ""
        return f"{words} at {line}column {error.colno:,}"
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are no UTF-8, at byte {error.start + 1:,}"
    return LONG_NUMBER


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ConfigError(f"expected each key once, found {key!r} twice")
        seen[key] = value
    return seen


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ConfigError(f"expected finite numbers, found {text}")
    return value


def _finite_integer(text: str) -> int:
    _finite(text)
    return int(text)


_STRICT: dict[str, Any] = {
    "object_pairs_hook": _unique,
    "parse_int": _finite_integer,
    "parse_float": _finite,
    "parse_constant": _finite,
}


def without_nan(value: Any) -> Any:
    """The value with null in place of NaN and infinities: Python reads them in a text, but JSON does not have them."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _depth_above(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        items = (item for each in level for item in (each.values() if isinstance(each, dict) else each))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        ConfigError: the file is missing or does not hold a JSON object.
    """
    try:
        about = path.stat()
        if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):  # its reading might never end
            raise ConfigError(f"{path}: expected a file, found a pipe, a socket or a device")
        if about.st_size > MAX_FILE:
            raise ConfigError(f"{path}: expected at most {MAX_FILE >> 20} MiB of JSON, found {about.st_size >> 20} MiB")
        content = path.read_bytes()
    except FileNotFoundError:
        found = "expected a file, found a broken link"
        raise ConfigError(f"{path}: {found}" if path.is_symlink() else f"file not found: {path}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: expected a file, found a folder") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ConfigError:
        raise
    except ValueError:  # a null character, or half of a surrogate pair, as only JSON can spell them
        raise ConfigError(f"{str(path)!r}: expected a path, found a text that is none") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected JSON, found {_mistake(content, error)}") from None
    raw = parse_json(text, path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw
