"""Evaluates what a checkpoint brings, chat templates and patterns, in a second process with limits.

A template or a regular expression can ask for hours or for terabytes. `jaxmoe/limited_worker.py` may use one GiB of
memory and a few seconds; the process is started at the first use and serves all requests of this one.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoe.errors import UserError

WORKER = pathlib.Path(__file__).with_name("limited_worker.py")
CPU_SECONDS = 5  # of the processor, for a request
WALL_SECONDS = 60  # for a request; it only counts where the system has no limit of processor time


class Rendered(NamedTuple):
    """A rendered chat template: its text, and the character range of every `{% generation %}` block."""

    text: str
    generated: list[tuple[int, int]]


def render(template: str, variables: Mapping[str, Any]) -> Rendered:
    """Renders a Jinja template in a sandbox, with the names that transformers gives to chat templates.

    Raises:
        UserError: the template fails, or needs too much time, memory or text. The message has no prefix.
    """
    found = _WORKER.ask({"task": "render", "template": template, "variables": dict(variables)})
    return Rendered(found["text"], [(start, end) for start, end in found["generated"]])


def first_match(patterns: Sequence[str], names: Sequence[str]) -> int | None:
    """The index of the first regular expression that matches the end of one of `names` after a dot, as in PEFT.

    Raises:
        UserError: no regular expression, or one that needs too much time. The message has no prefix.
    """
    if not patterns:
        return None
    return _WORKER.ask({"task": "first_match", "patterns": list(patterns), "names": list(names)})


class _Worker:
    """The second process. Several threads may ask; each waits for its turn."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._deadline = math.inf  # of the request that the process works on

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to one request."""
        with self._lock, self._running() as process:
            assert process.stdin is not None and process.stdout is not None
            self._deadline = time.monotonic() + WALL_SECONDS
            try:
                # A worker that has ended closes the pipe; the missing answer tells.
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(request, default=str) + "\n")
                    process.stdin.flush()
                line = process.stdout.readline()
            finally:
                self._deadline = math.inf
            if not line:
                self._end()
                raise UserError("needs too much time or memory")
            answer = json.loads(line)
        if "error" in answer:
            raise UserError(" ".join(answer["error"].split()))  # a template may raise what it likes
        return answer["result"]

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[str]]:
        """The process, started if necessary. After an interruption it is ended: its next answer would be an old one."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                # -P: the user's folder may hold a module with the name of one that the worker imports.
                [sys.executable, "-P", str(WORKER), str(self._seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for this process
            )
            threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
        try:
            yield self._process
        except UserError:
            raise
        except BaseException:
            self._end()
            raise

    def _watch(self, process: subprocess.Popen[str]) -> None:
        """Kills the process when its request takes too long. A thread for each request would cost as much as most
        requests do."""
        while process.poll() is None:
            if time.monotonic() > self._deadline:
                process.kill()
            time.sleep(1)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


_WORKER = _Worker(CPU_SECONDS)
