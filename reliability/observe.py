"""Runs a command inside this process as its user would see it, and judges how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

from jaxmoe.cli.arguments import run

SECONDS, MEMORY = 30.0, 2**30  # most time, and most memory beyond what the process held before


class Seen(NamedTuple):
    """How a command ended: its exit code, standard error, and what was wrong with that (empty: nothing)."""

    code: int
    stderr: str
    wrong: str

    @property
    def accepted(self) -> bool:
        """Whether the command did its work."""
        return self.code == 0 and not self.wrong


def observe(call: Callable[[], Any], folder: pathlib.Path) -> Seen:
    """Calls `call` as a command's main function, with its output in files of `folder`."""
    before, start = _peak(), time.monotonic()
    code: Any = 0
    trace = ""
    with _redirected(folder) as errors, _alarm(int(4 * SECONDS)):
        try:
            run(call)
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code, trace = 1, traceback.format_exc()
    return judge(code or 0, errors.read_text(errors="replace"), time.monotonic() - start, _peak() - before, trace)


def judge(code: Any, stderr: str, seconds: float, memory: int, trace: str = "") -> Seen:
    """Compares what was seen with what is promised."""
    # A notice that code was ignored is no error.
    lines = [line for line in stderr.splitlines() if line.strip() and "auto_map: ignored" not in line]
    wrong = ""
    if trace or "Traceback" in stderr:
        wrong = f"traceback: {(trace or stderr)[-1500:]}"
    elif code not in (0, 2):
        wrong = f"exit code {code}: {stderr[-500:]}"
    elif code == 2 and len(lines) != 1:
        wrong = f"{len(lines)} lines on standard error: {stderr[:500]}"
    elif seconds > SECONDS:
        wrong = f"{seconds:.0f} s"
    elif memory > MEMORY:
        wrong = f"{memory / 2**30:.1f} GiB"
    return Seen(code if isinstance(code, int) else 1, stderr, wrong)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _redirected(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Both streams and their descriptors lead to files; libraries that print by themselves are seen, too."""
    saved = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    errors = folder / "stderr"
    try:
        with tempfile.TemporaryFile("w") as out, errors.open("w") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = out, err
            _log_to(err)
            try:
                yield errors
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                _log_to(streams[1])
    finally:
        sys.stdout, sys.stderr = streams
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)


def _log_to(stream: TextIO) -> None:
    """Handlers that keep the standard error of their time, as those of some libraries do, write to `stream`."""
    loggers = [logging.root, *(each for each in logging.root.manager.loggerDict.values())]
    for handler in [handler for logger in loggers for handler in getattr(logger, "handlers", ())]:
        if type(handler) is logging.StreamHandler:
            handler.stream = stream  # setStream would flush the old one, which may be closed


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
