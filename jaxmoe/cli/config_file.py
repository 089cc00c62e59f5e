"""Settings from a TOML file, with flags on top: `--config run.toml`; and the file that repeats a run.

A key is the name of a flag, with underscores or hyphens. Standard library only.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import pathlib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxmoe.cli.arguments import ArgumentParser, flag_kinds
from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import LONG_NUMBER, MAX_FILE

_HELP = "TOML file with settings by the names of the flags; flags on the command line override it"


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config`; `given_settings` reads it before the parser does."""
    parser.add_argument("--config", type=pathlib.Path, metavar="FILE", help=_HELP)


def given_settings(argv: Sequence[str] | None, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the file that `--config` names in `argv` (None: the command line), if it is there.

    `kinds` maps the name of each setting to its type, as `flag_kinds` does.

    Raises:
        UserError: the file is missing, is not TOML, has an unknown key or a value of another type.
    """
    first = ArgumentParser(add_help=False)
    first.add_argument("--config", type=pathlib.Path)
    path = first.parse_known_args(argv)[0].config
    return {} if path is None else read_settings(path, kinds)


def read_settings(path: pathlib.Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a TOML file; types and errors as in `given_settings`."""
    found: dict[str, Any] = {}
    for key, value in _read_toml(path).items():
        name = key.replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)
            raise UserError(f"{path}: {shown(key)}: expected the name of a flag, found none; the nearest is {near[0]}")
        if name in found:
            raise UserError(f"{path}: {name}: expected it once, found it with underscores and with hyphens")
        found[name] = _value(kinds[name], value, f"{path}: {name}")
    return found


def _read_toml(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: expected a TOML file, found {'another kind of path' if path.exists() else 'none'}")
    if (size := path.stat().st_size) > MAX_FILE:
        raise UserError(f"{path}: expected at most {MAX_FILE >> 20} MiB, found {size >> 20:,} MiB")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected TOML, found a mistake: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: expected TOML, found too many arrays inside each other") from None
    except ValueError:
        raise UserError(f"{path}: expected TOML, found {LONG_NUMBER}") from None


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as a field of type `kind` holds it; a union has a tuple and the type of one item alone."""
    if isinstance(kind, types.UnionType):
        is_list = isinstance(value, list)
        kind = next(part for part in typing.get_args(kind) if (typing.get_origin(part) is tuple) == is_list)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where}: expected an array, found {shown(value)}")
        return tuple(_value(parts[0], item, where) for item in value)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in parts):
            raise UserError(f"{where}: expected one of {', '.join(map(str, parts))}; found {shown(value)}")
        return value
    words, accepted = {
        bool: ("true or false", (bool,)),
        int: ("a whole number below 2^63", (int,)),
        float: ("a finite number", (int, float)),
        str: ("a string", (str,)),
        pathlib.Path: ("a string", (str,)),
    }[kind]
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    if kind is int and fits:
        fits = -(2**63) <= value < 2**63
    if kind is float and fits:
        fits = _finite(value)
    if kind in (str, pathlib.Path) and fits and "\0" in value:  # which no argument of a command can hold
        words, fits = f"{words} without null characters", False
    if kind is pathlib.Path and fits:
        words, fits = "a path", value != ""
    if not fits:
        raise UserError(f"{where}: expected {words}, found {shown(value)}")
    return kind(value)


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def settings_text(settings: Any, comments: Sequence[str]) -> str:
    """A TOML file that holds the flags of the dataclass object `settings`, below `comments`.

    Left out are settings without a value, which TOML does not have, and those whose metadata says {"once": True}: they
    belong to one command, not to the run.
    """
    lines = [f"# {line}" for line in comments]
    once = {field.name for field in dataclasses.fields(settings) if field.metadata.get("once")}
    for name in flag_kinds(type(settings)):
        value = getattr(settings, name)
        if value is not None and name not in once:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    # JSON's escapes are TOML's; of the characters that TOML forbids, JSON leaves this one as it is.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
