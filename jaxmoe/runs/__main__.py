"""The commands `python -m jaxmoe.runs list | compare | report`: training runs, from what they left on disk."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports

import argparse
import pathlib
import sys
from collections.abc import Iterator, Sequence

from jaxmoe.cli.arguments import ArgumentParser, program_name, run, say
from jaxmoe.errors import UserError, printable

_DEPTH = 3  # folders below the one that is listed


def build_parser() -> ArgumentParser:
    """The commands and their flags."""
    parser = ArgumentParser(description="List, compare and draw training runs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    texts = {
        "list": "print a table of the runs in and below folders",
        "compare": "draw several runs in one HTML page",
        "report": "draw the page of a run again",
    }
    add = {
        name: commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", prog=f"{program_name()} {name}"
        ).add_argument
        for name, text in texts.items()
    }
    here = pathlib.Path(".")
    add["list"]("folders", type=pathlib.Path, nargs="*", default=[here], metavar="DIR", help="default: the current one")
    add["compare"]("runs", type=pathlib.Path, nargs="+", metavar="RUN", help="output folder of a run; two or more")
    page = "page to write (default: compare.html)"
    add["compare"]("--out", type=pathlib.Path, default=here / "compare.html", metavar="FILE", help=page)
    add["report"]("run", type=pathlib.Path, metavar="RUN", help="output folder of a run")
    add["report"]("--out", type=pathlib.Path, metavar="FILE", help="page to write (default: report.html in the run)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command and runs it."""
    arguments = build_parser().parse_args(argv)
    {"list": _list, "compare": _compare, "report": _report}[arguments.command](arguments)


def _list(arguments: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from jaxmoe.runs.record import read_run
    from jaxmoe.runs.report import ABOUT, about

    table, damaged = Table(*ABOUT, box=box.SIMPLE_HEAD), []
    for folder in _runs_below(arguments.folders):
        try:
            cells = (str(folder), *about(read_run(folder)))
            table.add_row(*(Text(printable(cell)) for cell in cells))
        except UserError as error:  # the others are still of interest
            damaged.append(str(error))
    console = Console()
    for line in damaged:
        print(printable(line), file=sys.stderr)
    if not table.row_count and not damaged:
        raise UserError(f"{', '.join(map(str, arguments.folders))}: expected runs in or below it, found none")
    # A wide table is not cut to the terminal's width, and a pipe has no width.
    Console(width=max(console.width, 200)).print(table)


def _runs_below(folders: Sequence[pathlib.Path]) -> Iterator[pathlib.Path]:
    """The runs in these folders and at most three levels below them, each once."""
    from jaxmoe.runs.record import is_run

    pending = [(folder, 0) for folder in folders]
    for folder, _ in pending:
        if not folder.is_dir():
            raise UserError(f"{folder}: expected a folder, found none")
    seen = set()
    while pending:
        folder, depth = pending.pop(0)
        if (real := folder.resolve()) in seen:
            continue
        seen.add(real)
        if is_run(folder):
            yield folder
        elif depth < _DEPTH:
            below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
            pending = [(path, depth + 1) for path in below] + pending


def _compare(arguments: argparse.Namespace) -> None:
    from jaxmoe.runs.record import read_run
    from jaxmoe.runs.report import write_report

    if len({folder.resolve() for folder in arguments.runs}) < max(2, len(arguments.runs)):
        raise UserError("compare: expected two runs or more, each once")
    write_report([read_run(folder) for folder in arguments.runs], arguments.out)
    say(f"wrote {arguments.out}")


def _report(arguments: argparse.Namespace) -> None:
    from jaxmoe.runs.record import read_run
    from jaxmoe.runs.report import REPORT_FILE, write_report

    path = arguments.out or arguments.run / REPORT_FILE
    write_report([read_run(arguments.run)], path)
    say(f"wrote {path}")


if __name__ == "__main__":
    run(main)
