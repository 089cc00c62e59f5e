"""Ends the process on SIGINT, SIGTERM and SIGHUP at any moment, from the first import to the last line; nothing
half-written stays.

Python calls a signal handler in the main thread, between two of its own instructions. While that thread compiles, the
handler waits for minutes; and what it raises may be caught by any code that happens to run. So a thread of its own
receives the signals. It undoes what the process has begun to write, prints one line, and ends the process.

`watch` starts that thread; only commands call it. Without it, signals do what the program around has decided. SIGHUP
says that the terminal is gone; a command that was started with `nohup` ignores it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from jaxmoe import broken_environment

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_PATIENCE = 10.0  # seconds to wait for a block of `uninterrupted`, which takes milliseconds


class _State:
    """What this process has begun and not finished."""

    def __init__(self) -> None:
        self.watching = False
        self.postponed: Postponed | None = None
        self.keyboard: Keyboard | None = None
        self.undo: list[Callable[[], object]] = []
        self.guard = threading.RLock()


_state = _State()


def watch() -> None:
    """From now on the signals end the process with exit code 130, 143 or 129, and an environment that is broken does so
    with one line. Call it in the main thread, first."""
    if _state.watching:
        return
    _state.watching = True
    broken_environment.report_in_one_line()
    atexit.register(_ignore_signals)  # registered first, so it is called last
    if os.name == "nt":  # no pipe can wake a thread there
        for number in _heard():
            signal.signal(number, lambda number, frame: _arrived(number))
        return
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for number in _heard():
        signal.signal(number, _leave_to_the_thread)
    threading.Thread(target=_receive, args=(receiver,), name="signals", daemon=True).start()


@contextlib.contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """If a signal ends the process within the block, `undo` is called first, in another thread; otherwise never."""
    with _state.guard:
        _state.undo.append(undo)
    try:
        yield
    finally:
        with _state.guard:
            _state.undo.remove(undo)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block no signal ends the process. The block must be short: a rename, or a few."""
    with _state.guard:
        yield


class Postponed:
    """Within its block the first signal is only noted in `received`; a second one ends the process.

    It also works in programs that do not call `watch`, in the main thread; a second signal then has the system's
    default action.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Postponed:
        """Begins to note signals."""
        if _state.watching:
            _state.postponed = self
        elif threading.current_thread() is threading.main_thread():
            for number in _heard():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Restores what signals did before."""
        _state.postponed = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            # The system's default action needs no interpreter: it also ends a process that waits for the device.
            signal.signal(each, signal.SIG_DFL)


class Keyboard:
    """Within its block Ctrl-C belongs to a talk with the user.

    While the command asks (`asking`), Ctrl-C raises KeyboardInterrupt. While it answers (`answering`), the first Ctrl-C
    sets `stopped` and a second one ends the process. In between it does nothing. Other signals keep their effect.

    It also works in programs that do not call `watch`, in the main thread; elsewhere Ctrl-C keeps its effect, too.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._asks = self._answers = False
        self._before: Any = None
        # The thread that `watch` starts hears the signal at once, while the handler waits for the interpreter.
        self._heard_by_handler = not _state.watching or os.name == "nt"

    def __enter__(self) -> Keyboard:
        """Takes Ctrl-C over."""
        if threading.current_thread() is threading.main_thread():
            _state.keyboard = self
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Restores what Ctrl-C did before."""
        if _state.keyboard is self:
            signal.signal(signal.SIGINT, self._before)
            _state.keyboard = None

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Within the block Ctrl-C raises KeyboardInterrupt."""
        self._asks = True
        try:
            yield
        finally:
            self._asks = False

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Within the block the first Ctrl-C sets `stopped`, which is false at its start."""
        self.stopped, self._answers = False, True
        try:
            yield
        finally:
            self._answers = False

    def pressed(self) -> None:
        """Ctrl-C arrived."""
        if self._answers and self.stopped:
            _end(signal.SIGINT)
        self.stopped = self._answers

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._heard_by_handler:
            self.pressed()
        if self._asks:
            raise KeyboardInterrupt


def _heard() -> list[int]:
    """The signals that the process does not ignore on purpose, as it does SIGHUP after `nohup`."""
    hang_up = getattr(signal, "SIGHUP", None)
    return [number for number in SIGNALS if number != hang_up or signal.getsignal(number) != signal.SIG_IGN]


def _leave_to_the_thread(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing. Without one in Python, the interpreter would not write to the pipe."""


def _ignore_signals() -> None:
    """The command is done, and its exit code says so: the interpreter, which now ends, must not be killed."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _receive(receiver: int) -> None:
    while numbers := os.read(receiver, 64):
        for number in numbers:
            if number in SIGNALS:
                _arrived(number)


def _arrived(number: int) -> None:
    _leave_lost_terminal()
    postponed, keyboard = _state.postponed, _state.keyboard
    if keyboard is not None and number == signal.SIGINT:
        keyboard.pressed()
    elif postponed is not None and postponed.received is None:
        postponed.received = number
    else:
        _end(number)


def _leave_lost_terminal() -> None:
    """Lets what is printed to a terminal that is gone go nowhere: otherwise it would be an error."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _end(number: int) -> None:
    """Ends the process with the signal's exit code."""
    _state.guard.acquire(timeout=_PATIENCE)
    words = f"{signal.Signals(number).name}: stopped"
    if _state.undo:
        words += "; what it had begun to write was removed"
    end(128 + number, words)


def end(code: int, words: str) -> NoReturn:
    """Undoes what is unfinished, last things first, prints one line on standard error and ends the process, from any
    thread. No other thread may finish a block of `uninterrupted` any more."""
    _state.guard.acquire(timeout=_PATIENCE)
    while _state.undo:
        with contextlib.suppress(Exception):
            _state.undo.pop()()
    with contextlib.suppress(OSError, ValueError):
        shown = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides the cursor
        os.write(2, f"{shown}{words}\n".encode())
    os._exit(code)
