"""How far a long job is: a bar on a terminal, gone when the job is done; a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL = 5.0  # seconds between two lines

Show = Callable[[int, int, str], None]  # done, of how much, in words


@contextmanager
def progress(what: str, *, on_stderr: bool = False) -> Iterator[Show]:
    """Gives a function to call as often as one likes. A bar is on standard error, lines are on standard output unless
    that is for what the command gives (`on_stderr`)."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn(what, markup=False), BarColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=None, words="")
            yield lambda done, total, words: bar.update(task, completed=done, total=total, words=words)
        return
    shown = time.monotonic()

    def line(done: int, total: int, words: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= INTERVAL:
            shown = time.monotonic()
            print(f"{what}: {words}", file=sys.stderr if on_stderr else sys.stdout, flush=True)

    yield line


@contextmanager
def reading_weights(*, on_stderr: bool = False) -> Iterator[Callable[[int, int], None]]:
    """`progress` for the `on_layer` of what reads a checkpoint."""
    with progress("reading the weights", on_stderr=on_stderr) as show:
        yield lambda done, total: show(done, total, f"{done} of {total} layers")
