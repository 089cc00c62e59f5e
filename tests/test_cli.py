"""Flags from a dataclass, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import errno
import pathlib
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest

from jaxmoe.cli import arguments as cli
from jaxmoe.errors import UserError
from tests.conftest import ROOT


@dataclass
class Options:
    model: str = field(metadata={"help": "the model's folder"})
    steps: int = field(default=10, metadata={"help": "steps, 100% of them"})
    learning_rate: float = 1e-4
    targets: tuple[str, ...] = ("attention",)
    widths: tuple[int, ...] = ()
    pairs: tuple[str, ...] = field(default=(), metadata={"repeat": True})
    dtype: Literal["float32", "bfloat16"] | None = None
    output: pathlib.Path | None = None
    resume: bool = False
    pack: bool = field(default=True, metadata={"group": "the rest"})
    state: dict = field(default_factory=dict, metadata={"flag": False})


def parse(*arguments: str) -> Options:
    parser = cli.ArgumentParser(prog="program")
    cli.add_dataclass_arguments(parser, Options)
    return cli.dataclass_from_arguments(Options, parser.parse_args(arguments))


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parse("--model", "m") == Options("m")


def test_every_kind_of_field() -> None:
    found = parse(
        *("--model", "m", "--steps", "-3", "--learning-rate", "5e-4", "--targets", "q_proj, gate", "--widths", "1,2"),
        *("--pairs", "a=[1,2]", "--pairs", "b", "--dtype", "bfloat16", "--output", "a/b", "--resume", "--no-pack"),
    )
    assert found == Options(
        "m",
        *(-3, 5e-4, ("q_proj", "gate"), (1, 2), ("a=[1,2]", "b")),
        *("bfloat16", pathlib.Path("a/b")),
        resume=True,
        pack=False,
    )
    assert parse("--model", "m").pairs == (), "what one call was given does not stay"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "program: the following arguments are required: --model\n"),
        (["--model", "m", "--steps", "1.5"], "program: argument --steps: expected a whole number, found '1.5'\n"),
        (
            ["--model", "m", "--learning-rate", "nan"],
            "program: argument --learning-rate: expected a finite number, found 'nan'\n",
        ),
        (
            ["--model", "m", "--dtype", "int8"],
            "program: argument --dtype: expected one of float32, bfloat16; found 'int8'\n",
        ),
        (["--model", "m", "--widths", "1,x"], "program: argument --widths: expected a whole number, found 'x'\n"),
        (
            ["--model", "m", "--step", "1"],
            "program: unrecognized arguments: --step 1; did you mean --steps instead of --step?\n",
        ),
        (
            ["--modle=m"],
            "program: the following arguments are required: --model; did you mean --model instead of --modle?\n",
        ),
        (["--model", "m", "--state", "1"], "program: unrecognized arguments: --state 1\n"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(*arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", message)


def test_a_command_names_the_flag_that_an_unknown_one_resembles(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.ArgumentParser(prog="program")
    commands = parser.add_subparsers(dest="command")
    cli.add_dataclass_arguments(commands.add_parser("one"), Options)
    commands.add_parser("other").add_argument("--stepz")
    with pytest.raises(SystemExit):
        parser.parse_args(["one", "--model", "m", "--step", "1", "--nothing"])
    message = "program: unrecognized arguments: --step 1 --nothing; did you mean --steps instead of --step?\n"
    assert capsys.readouterr() == ("", message)


def test_help_shows_text_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "steps, 100% of them (default: 10)" in shown
    assert "(default: attention)" in shown
    assert shown.index("--resume, --no-resume") < shown.index("the rest: --pack, --no-pack")
    assert "--dtype {float32,bfloat16}" in shown


def test_a_field_that_no_flag_can_hold_is_a_bug() -> None:
    @dataclass
    class Odd:
        table: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match="field 'table'"):
        cli.add_dataclass_arguments(argparse.ArgumentParser(), Odd)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("rank: expected at least 1,\n  found 0"), 2, "program: rank: expected at least 1, found 0\n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x.json"), 2, "x.json: No such file"),
        (OSError("the shard is truncated"), 2, "program: the shard is truncated\n"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: no 2147483648 bytes\nare left"),
            2,
            "out of device memory (2.00 GiB more): use",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_turns_errors_into_codes(
    error: BaseException,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "program_name", lambda: "program")

    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(main)
    assert stopped.value.code == code
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == (1 if message else 0)


@pytest.mark.parametrize("returned", [None, 0, 3])
def test_run_exits_with_what_main_returns(returned: int | None) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: returned)
    assert stopped.value.code == (returned or 0)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), AssertionError("a bug")])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    def main() -> int:
        raise error

    with pytest.raises(type(error), match="a bug"):
        cli.run(main)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    program = "import sys; from jaxmoe.cli.arguments import run; run(lambda: print('x\\n' * 10**6))"
    command = f'{sys.executable} -c "{program}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x\n", "")
