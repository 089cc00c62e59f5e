"""Executes the notebooks, from the repository's root: `python -m notebooks [NAME ...] [--set MODEL=DIR]`."""

from __future__ import annotations

import os
import pathlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import nbformat

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.errors import UserError

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent


def names() -> list[str]:
    """The notebooks, in reading order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def with_settings(source: str, settings: Mapping[str, str]) -> str:
    """The notebook's first cell of code, `NAME = value` in each line, with other values.

    Raises:
        UserError: the cell has no line of that name.
    """
    for name, value in settings.items():
        line = f"{name} = {value}"
        source, found = re.subn(rf"^{re.escape(name)} = .*", lambda _, line=line: line, source, flags=re.M)
        if not found:
            known = ", ".join(re.findall(r"^(\w+) = ", source, flags=re.M))
            raise UserError(f"--set: expected a setting of the notebook's first cell ({known}), found {name!r}")
    return source


def execute(name: str, settings: Mapping[str, str] | None = None, timeout: int = 600) -> Any:
    """Runs every cell of the notebook in a fresh kernel and returns it with its outputs; nothing is written.

    Args:
        name: as in `names()`.
        settings: other values of the first cell's settings, as Python expressions.
        timeout: seconds for one cell.

    Raises:
        UserError: a setting that the notebook does not have.
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = with_settings(first.source, settings or {})
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # the kernel's debugger warns about frozen modules
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # a progress bar would not be seen
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        extra_arguments=["--log-level=ERROR"],
        record_timing=False,
    )
    client.execute()
    # Other metadata differs from machine to machine and is irrelevant.
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def read_settings(given: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE` as names and Python expressions; what is no number is text."""
    settings = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UserError(f"--set: expected NAME=VALUE, found {text!r}")
        settings[name] = value if re.fullmatch(r"-?\d+(\.\d+)?([eE]-?\d+)?", value) else repr(value)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Executes the named notebooks, or all, and writes them with their output."""
    from nbclient.exceptions import CellExecutionError

    parser = ArgumentParser(description="Execute the notebooks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="name without .ipynb (default: all)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value of a setting in the notebook's first cell, such as MODEL=DIR; may be repeated",
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=FOLDER, metavar="DIR", help="where to write them (default: in place)"
    )
    arguments = parser.parse_args(argv)
    settings = read_settings(arguments.set)
    if unknown := [name for name in arguments.names if name not in names()]:
        raise UserError(f"notebook: expected one of {', '.join(names())}; found {unknown[0]!r}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or names():
        start = time.perf_counter()
        try:
            notebook = execute(name, settings)
        except CellExecutionError as error:
            if error.ename != "UserError":
                raise
            raise UserError(f"{name}: {error.evalue}") from None
        nbformat.write(notebook, arguments.output / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run(main)
