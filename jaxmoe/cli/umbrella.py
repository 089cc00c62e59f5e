"""The command `jaxmoe COMMAND ...`, and `jaxmoe completion SHELL`, which prints a script that completes its arguments.

Standard library only until a command runs.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jaxmoe
from jaxmoe import stopping
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.cli.commands import COMMANDS
from jaxmoe.errors import UserError

COMPLETION = "completion"
SHELLS = ("bash", "zsh")
_PATHS = {"CAPTURE", "DIR", "DST", "FILE", "PATH", "RUN", "SRC"}  # metavars


def start() -> None:
    """The entry point of the console script `jaxmoe`."""
    stopping.watch()
    run(main)


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs the command that `argv` (default: the command line) names, with the arguments after it."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]].load().main(argv[1:])
    arguments = build_parser().parse_args(argv)
    print(completion(arguments.shell))
    return 0


def build_parser() -> ArgumentParser:
    """The commands, without their flags; only `completion` is parsed here."""
    parser = ArgumentParser(prog="jaxmoe", description="Qwen3-MoE in JAX: training, generation, conversion, routing.")
    parser.add_argument("--version", action="version", version=f"jaxmoe {jaxmoe.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.text, add_help=False)
    text = "print a script for the shell that completes commands and flags"
    sub = commands.add_parser(COMPLETION, help=text, description=text[0].upper() + text[1:] + ".")
    sub.add_argument("shell", choices=SHELLS, metavar="SHELL", help=" or ".join(SHELLS))
    return parser


def completion(shell: str) -> str:
    """The script for `shell` that completes all commands, their flags, choices and paths.

    Raises:
        UserError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UserError("completion: shtab is not installed: pip install shtab") from None
    parser = build_parser()
    (commands,) = _subcommands(parser)
    for name, command in COMMANDS.items():
        commands.choices[name] = command.load().build_parser()
    _complete_paths(parser, {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY})
    return shtab.complete(parser, shell)


def _subcommands(parser: argparse.ArgumentParser) -> list[argparse._SubParsersAction]:
    return [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]


def _complete_paths(parser: argparse.ArgumentParser, kinds: dict[str, Any]) -> None:
    """Marks the arguments that are paths, as shtab wants it, also those of subcommands."""
    for action in parser._actions:
        if action.type is pathlib.Path or action.metavar in _PATHS:
            setattr(action, "complete", kinds["DIR" if action.metavar == "DIR" else "FILE"])  # noqa: B010
    for commands in _subcommands(parser):
        for sub in commands.choices.values():
            _complete_paths(sub, kinds)
