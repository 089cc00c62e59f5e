"""What every command of the project shares: flags from a dataclass, one-line errors, exit codes. Standard library only.

Exit codes: 0 on success; 2 for a user error or bad input, with one line on stderr; 3 if another process of the same run
died (`jaxmoe.distributed.ending`); 130, 143 and 129 after SIGINT, SIGTERM and SIGHUP (`jaxmoe.stopping`); 141 if the
reader closes the pipe. Any other exception is a bug and keeps its traceback. Only `jaxmoe.generate --interactive` reads
standard input.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import io
import math
import os
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeVar, Union

from jaxmoe.errors import UserError, printable
from jaxmoe.out_of_memory import exhausted

T = TypeVar("T")

# What an error of the system is about that names no file: others are named where they are read and written.
_UNNAMED = {errno.ENOSPC: "standard output", errno.EIO: "standard output", errno.ENOENT: "the current folder"}

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the shell's convention
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
MAX_MESSAGE = 2000  # characters of an error's line


def program_name() -> str:
    """The command as the user typed it: `python -m jaxmoe.train`, `jaxmoe train`, or the script's file name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        name = f"python -m {spec.name.removesuffix('.__main__')}"
    else:
        name = pathlib.Path(sys.argv[0]).name or "python"
    if name in ("jaxmoe", "python -m jaxmoe") and len(sys.argv) > 1 and sys.argv[1].isidentifier():
        name += f" {sys.argv[1]}"
    return name


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with exact flag names, whose errors are one line (`program: message`) and exit code 2.

    The line ends with the commands, if none is given, and with the flags that unknown ones resemble.
    """

    _given: Sequence[str] = ()  # what is being parsed

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("prog", program_name())
        # A new flag could make an abbreviation ambiguous.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.register("type", pathlib.Path, _path)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        for commands in self._commands():
            if message.endswith(f"required: {commands.metavar}"):
                message += f" ({', '.join(commands.choices)})"
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {_one_line(message + self._similar_flags())}\n")

    def _commands(self) -> list[argparse._SubParsersAction]:
        return [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]

    def _similar_flags(self) -> str:
        known = set(self._option_string_actions)
        for commands in self._commands():
            for name in set(self._given) & set(commands.choices):
                known |= set(commands.choices[name]._option_string_actions)
        flags = [text.partition("=")[0] for text in self._given if text.startswith("--") and " " not in text]
        pairs = []
        for flag in flags:
            near = difflib.get_close_matches(flag, sorted(known), n=1, cutoff=0.75) if flag not in known else []
            pairs += [f"{each} instead of {flag}" for each in near]
        return f"; did you mean {', '.join(pairs)}?" if pairs else ""


def flag_kinds(cls: type) -> dict[str, Any]:
    """The fields of the dataclass `cls` that are flags: name -> type, without None."""
    hints = typing.get_type_hints(cls)
    return {field.name: _without_none(hints[field.name]) for field in _flag_fields(cls)}


class _Repeated(argparse.Action):
    """A flag that is given once for each item; what is given replaces the default."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [values] if before is self.default else [*before, values])


class _Several(argparse.Action):
    """A flag with several values, which may be given again for more; what is given replaces the default."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is self.default else before), *values])


def add_dataclass_arguments(
    parser: argparse.ArgumentParser, cls: type, given: Mapping[str, Any] = types.MappingProxyType({})
) -> None:
    """Adds one flag for each field of the dataclass `cls`: `learning_rate` becomes `--learning-rate`.

    The type of a field decides how the flag's text is read. str, int, float and pathlib.Path are read directly; bool
    becomes `--flag` and `--no-flag`; `Literal[...]` becomes choices; `tuple[X, ...]` is a list separated by commas;
    `X | None` is read as X. A field without a default is a required flag.
    `field(metadata=...)` may hold "help" and "metavar"; {"flag": False} leaves the field out. {"group": TITLE} puts
    this flag and those after it under a heading of `--help`. {"repeat": True} makes a tuple of a flag that is given
    once for each item, {"several": True} a tuple of strings of one with several values, which may also be given again.
    `given` holds values, such as those of a file, that take the place of defaults.

    Raises:
        TypeError: a field has a type that no flag can hold.
    """
    kinds = flag_kinds(cls)
    group: Any = parser
    for field in _flag_fields(cls):
        if "group" in field.metadata:
            group = parser.add_argument_group(field.metadata["group"])
        default, required = (given[field.name], False) if field.name in given else _default(field)
        kind = kinds[field.name]
        text = field.metadata.get("help", "").replace("%", "%%")
        if default is not None and default != ():
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default: {shown})"
        options: dict[str, Any] = {"dest": field.name, "help": text.strip(), "default": default, "required": required}
        flag = "--" + field.name.replace("_", "-")
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            if field.metadata.get("several"):
                kind = str
                options |= {"action": _Several, "nargs": "+"}
            elif field.metadata.get("repeat"):
                kind = typing.get_args(kind)[0]
                options |= {"action": _Repeated, "default": list(default or ())}
            elif typing.get_origin(kind) is Literal:
                options["choices"] = typing.get_args(kind)  # for the completion of shells: `_choice` refuses others
            convert, metavar = _reader(kind, field.name)
            group.add_argument(flag, type=convert, metavar=field.metadata.get("metavar", metavar), **options)


def dataclass_from_arguments(cls: type[T], arguments: argparse.Namespace) -> T:
    """Builds the dataclass `cls` from the arguments parsed with its flags."""
    given = {field.name: getattr(arguments, field.name) for field in _flag_fields(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def run(main: Callable[[], int | None]) -> NoReturn:
    """Calls `main` and exits with its result; on `UserError`, `OSError` and where a device's or the host's memory is
    full, with one line on stderr and code 2."""
    _prepare_streams()
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        _forget(sys.stdout)
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as error:
        _forget_what_cannot_be_written(error)
        named = error.filename if error.filename is not None else _UNNAMED.get(error.errno or 0)
        known = named is not None and error.strerror is not None
        _fail(f"{named}: {error.strerror}" if known else str(error) or type(error).__name__)
    except UserError as error:
        _fail(str(error))
    except MemoryError as error:
        _fail(f"out of memory: {error}" if str(error) else "out of memory")
    except RuntimeError as error:
        line = exhausted(error)
        if line is None:
            raise
        _fail(f"{line}: use a smaller batch, or shorter sequences")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(code)


def _prepare_streams() -> None:
    """Makes standard output and error safe to print to: closed ones go nowhere, and no character is too much for them.

    Python sets a stream that is closed to None; its number would go to the next file that is opened.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            with contextlib.suppress(OSError):
                opened = os.open(os.devnull, os.O_WRONLY)
                if opened != number:
                    os.dup2(opened, number)
                    os.close(opened)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line that may hold names from files."""
    print(printable(text))


def _fail(message: str) -> NoReturn:
    try:
        print(f"{program_name()}: {_one_line(message)}", file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        _forget(sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _forget_what_cannot_be_written(error: OSError) -> None:
    if error.errno in (errno.ENOSPC, errno.EIO) and error.filename in (None, "standard output"):
        _forget(sys.stdout)


def _forget(stream: Any) -> None:
    """Lets what the stream still holds go nowhere: otherwise the interpreter fails when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


def _flag_fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init and field.metadata.get("flag", True)]


def _default(field: dataclasses.Field[Any]) -> tuple[Any, bool]:
    if field.default is not dataclasses.MISSING:
        return field.default, False
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory(), False
    return None, True


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        rest = [part for part in typing.get_args(hint) if part is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return hint


def _reader(kind: Any, name: str) -> tuple[Callable[[str], Any], str]:
    """A function from text to a value of type `kind`, and the metavar that describes it."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return lambda text: _choice(text, parts), "{" + ",".join(map(str, parts)) + "}"
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        read, metavar = _reader(parts[0], name)
        return lambda text: tuple(read(item.strip()) for item in text.split(",") if item.strip()), f"{metavar},..."
    simple: dict[Any, tuple[Callable[[str], Any], str]] = {
        str: (str, "TEXT"),
        int: (whole_number, "N"),
        float: (finite_number, "X"),
        pathlib.Path: (pathlib.Path, "PATH"),
    }
    if kind not in simple:
        raise TypeError(f"field {name!r}: expected a type that a flag can hold, found {kind!r}")
    return simple[kind]


def _choice(text: str, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise argparse.ArgumentTypeError(f"expected one of {', '.join(map(str, choices))}; found {text!r}")


def add_memory_limit(parser: argparse.ArgumentParser, default: float | None = None) -> None:
    """Adds `--memory-limit`, for `jaxmoe.cli.xla.configure`."""
    text = "hold at most this much of an NVIDIA GPU's memory, everything counted (default: what JAX takes, 75 % of it)"
    text = text.replace("%", "%%")
    parser.add_argument("--memory-limit", type=finite_number, metavar="GIB", default=default, help=text)


def path_name(text: str) -> str:
    """A path, or a name that may be one, as it is; a type for `add_argument`.

    An empty text, which an unset variable of the shell leaves, is refused: it would stand for the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return text


def _path(text: str) -> pathlib.Path:
    return pathlib.Path(path_name(text))


def whole_number(text: str) -> int:
    """The whole number in a flag's text, of at most 63 bits; a type for `add_argument`."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^63, found {text}")
    return value


def finite_number(text: str) -> float:
    """The finite number in a flag's text; a type for `add_argument`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return value
