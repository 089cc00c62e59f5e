"""Progress of long jobs and of training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

INTERVAL = 5.0  # seconds between two lines of a job

Show = Callable[[int, int, str], None]  # done, total, description


class _State:
    """Whether this process shows anything."""

    hidden = False


_state = _State()


def hide() -> None:
    """From now on nothing is shown: another process of the same run shows it."""
    _state.hidden = True


@contextlib.contextmanager
def shown(by_this_process: bool) -> Iterator[None]:
    """Unless `by_this_process`, shows no progress from now on, and prints nothing on standard output within the block:
    another process of the same run does."""
    if by_this_process:
        yield
        return
    hide()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class _Bar:
    """The form for a terminal: a progress bar of rich with these columns, on standard output or standard error."""

    def __init__(self, *columns: Any, on_stderr: bool = False, transient: bool = False, **task: Any) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(*columns, console=Console(stderr=on_stderr), transient=transient)
        self._task = self._bar.add_task("", **task)
        self._bar.start()

    def update(self, **task: Any) -> None:
        self._bar.update(self._task, **task)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def print_line(text: str, *, on_stderr: bool = False) -> None:
    """Prints one line and flushes it; an error names the stream."""
    if _state.hidden:
        return
    try:
        print(text, file=sys.stderr if on_stderr else sys.stdout, flush=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard error" if on_stderr else "standard output") from error


@contextlib.contextmanager
def progress(what: str, *, on_stderr: bool = False) -> Iterator[Show]:
    """Yields a function that reports progress and may be called as often as needed.

    On a terminal it shows a bar on standard error, which disappears when the job is done. Elsewhere it prints a line
    every few seconds: on standard error if `on_stderr` (standard output is for the result), else on standard output.
    """
    if sys.stderr.isatty() and not _state.hidden:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

        columns = TextColumn(what, markup=False), BarColumn(), TextColumn("{task.fields[words]}"), TimeRemainingColumn()
        bar = _Bar(*columns, on_stderr=True, transient=True, total=None, words="")
        try:
            yield lambda done, total, words: bar.update(completed=done, total=total, words=words)
        finally:
            bar.close()
        return
    shown = time.monotonic()

    def show(done: int, total: int, words: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= INTERVAL:
            shown = time.monotonic()
            print_line(f"{what}: {words}", on_stderr=on_stderr)

    yield show


@contextlib.contextmanager
def reading_weights(*, on_stderr: bool = False) -> Iterator[Callable[[int, int], None]]:
    """`progress` as an `on_layer` callback for reading a checkpoint."""
    with progress("reading the weights", on_stderr=on_stderr) as show:
        yield lambda done, total: show(done, total, f"{done} of {total} layers")


class TrainingProgress:
    """Progress of a training run, on standard output: a bar with loss, tokens/s and time left, or one line per logged
    step."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._start: tuple[float, int] | None = None  # time and step from which the pace is measured
        self._bar = None
        if sys.stdout.isatty() and not _state.hidden:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = [
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
            self._bar = _Bar(*columns, total=total, completed=done, state="compiling")

    def step(self, numbers: dict[str, Any], *, logged: bool) -> None:
        """Shows one finished step; `numbers` are those of metrics.jsonl."""
        if self._start is None:
            self._start = time.perf_counter(), numbers["step"]  # the first step is mostly compilation
        start, first = self._start
        done, speed = numbers["step"], numbers["tokens_per_second"]
        loss, pace = f"loss {numbers['loss']:.4f}", "" if speed is None else f"  {speed:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(completed=done, state=loss + pace)
        elif logged:
            line = f"step {done}/{self._total}  {loss}  lr {numbers['learning_rate']:.2e}"
            line += f"  grad norm {numbers['grad_norm']:.3f}{pace}"
            if done > first:
                seconds = (time.perf_counter() - start) / (done - first)
                line += f"  {_clock(seconds * (self._total - done))} left"
            print_line(line)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.say(text)
        else:
            print_line(text)

    def close(self) -> None:
        """Restores the terminal."""
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
