"""Executes the notebooks in place, from the repository's root: `python -m notebooks [NAME ...]`."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import nbformat

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.errors import UserError

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent


def names() -> list[str]:
    """The notebooks, in reading order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def execute(name: str, timeout: int = 600) -> Any:
    """Runs every cell of the notebook in a fresh kernel and returns it with its outputs; nothing is written.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Executes the named notebooks, or all, and writes them with their output."""
    parser = ArgumentParser(description="Execute the notebooks in place.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="name without .ipynb (default: all)")
    arguments = parser.parse_args(argv)
    for name in arguments.names or names():
        if name not in names():
            raise UserError(f"notebook: expected one of {', '.join(names())}; found {name!r}")
        start = time.perf_counter()
        notebook = execute(name)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run(main)
