"""How the processes of a run end together.

Each process watches the others, in a thread. One that dies is noticed by JAX's coordinator when its signs of life stay
away; the others then end with one line that names it, and exit code 3. A process that ends with an error says so
before. A signal to one process stops all of them after the same step.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from jaxmoe import stopping
from jaxmoe.distributed import launch

EXIT_OTHERS = 3  # another process of the run died
_INTERVAL = 0.5  # seconds between two looks at the others
_LONGEST = 7 * 24 * 3600  # seconds that process 0 may write what the others wait for; a death ends the wait
_MOMENT = 5.0  # seconds in which the others notice what a process says before it ends
_ENDED, _HEARD = "jaxmoe/ended/", "jaxmoe/heard/"
_WAY_OUT = "the same commands with --resume continue from the last checkpoint"
# What JAX reports on every process when the connection to one of them breaks.
_BROKEN = ("gloo", "nccl", "connection", "socket", "unavailable", "coordination", "deadline")


_runs = itertools.count()


class Watch:
    """What this process knows of the others."""

    def __init__(self, process: launch.Process) -> None:
        self._process, self._client = process, launch.client()
        self._hosts: dict[int, str] = {}
        self._over = threading.Event()
        # A reference, so that the function lives as long as the process.
        self._on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: self._aborted())

    def begin(self) -> None:
        """Begins to watch."""
        me = self._process.index
        self._client.key_value_set(f"jaxmoe/host/{me}", socket.gethostname())
        for index in range(self._process.count):
            self._hosts[index] = self._client.blocking_key_value_get(f"jaxmoe/host/{index}", 1000 * launch.PATIENCE)
        # JAX aborts when process 0, with the coordinator, is gone; Python would run a handler of its own too late.
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._on_abort)
        threading.Thread(target=self._run, name="other-processes", daemon=True).start()

    def say(self, words: str) -> None:
        """Tells the others that this process ends, and why; returns when they know, or could have known."""
        if self._over.is_set():
            return
        self._over.set()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_ENDED}{self._process.index}", words)
            if self._process.is_first:
                self._wait_until_heard(self._process.count - 1)

    def wait_for_verdict(self) -> None:
        """Gives the watching thread the time to end this process because another one is dead."""
        time.sleep(self._process.heartbeat + _MOMENT)

    def close(self) -> None:
        """All is done: waits for the others, and leaves them. Process 0 leaves last."""
        import jax

        self._client.wait_at_barrier("jaxmoe/done", 1000 * _LONGEST)
        self._over.set()
        if self._process.is_first:
            self._wait_until_left()
        jax.distributed.shutdown()

    def _run(self) -> None:
        everyone = list(range(self._process.count))
        while not self._over.wait(_INTERVAL):
            try:
                ended = self._client.key_value_dir_get(_ENDED)
                alive = self._client.get_live_nodes(everyone)
            except Exception:  # the coordinator is gone, and process 0 with it
                time.sleep(_INTERVAL)
                if not self._over.is_set() and not self._coordinator_listens():
                    self._end(0, "died")
                continue
            if self._over.is_set():
                return
            dead = [(int(key.rpartition("/")[2]), words) for key, words in ended]
            dead += [(index, "died") for index in everyone if index not in alive]
            if dead:
                self._hear()
                self._end(*dead[0], others=len(alive) if self._process.is_first else 0)

    def _end(self, index: int, what: str, others: int = 0) -> NoReturn:
        """Ends this process because of another one; process 0 does so when `others` know of it, too."""
        self._over.set()
        if others:
            self._wait_until_heard(others)
        stopping.end(EXIT_OTHERS, f"process {index} on {self._hosts.get(index)} {what}; {_WAY_OUT}")

    def _hear(self) -> None:
        """Tells process 0 that this process knows what there is to know, so that it need not wait."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_HEARD}{self._process.index}", "", allow_overwrite=True)

    def _wait_until_heard(self, others: int) -> None:
        """Waits until so many other processes know: the coordinator ends with process 0."""
        until = time.monotonic() + _MOMENT
        with contextlib.suppress(Exception):
            while time.monotonic() < until and len(self._client.key_value_dir_get(_HEARD)) < others:
                time.sleep(0.05)

    def _wait_until_left(self) -> None:
        """Waits until process 0 is alone: JAX aborts a process that leaves a coordinator which has ended."""
        until = time.monotonic() + launch.PATIENCE
        everyone = list(range(self._process.count))
        with contextlib.suppress(Exception):
            while time.monotonic() < until and len(self._client.get_live_nodes(everyone)) > 1:
                time.sleep(0.05)

    def _aborted(self) -> None:
        # No call to the coordinator here: this may be the thread that would receive the answer.
        if not self._over.is_set() and not self._coordinator_listens():
            self._end(0, "died")

    def _coordinator_listens(self) -> bool:
        host, _, port = self._process.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            return False
        return True


class _State:
    """How this process watches the others; None if it is alone."""

    watch: Watch | None = None


_state = _State()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within the block the processes of the run live and die together; a process that is alone only runs it."""
    process = launch.this()
    if process.count == 1 or _state.watch is not None:
        yield
        return
    watch = _state.watch = Watch(process)
    watch.begin()
    with stopping.undone_by(lambda: watch.say("was stopped by a signal")):
        try:
            yield
        except BaseException as error:
            if any(word in str(error).lower() for word in _BROKEN):
                watch.wait_for_verdict()
            watch.say(f"ended: {_in_words(error)}")
            raise
    watch.close()


class CommonStop:
    """After which step of a run its processes stop, if one of them wants to; made by all of them."""

    def __init__(self) -> None:
        self._place = f"jaxmoe/stop/{next(_runs)}"
        self._wished = False  # whether this process has said that it wants to stop
        self._last: tuple[int, int] | None = None  # the step after which all stop, and the signal that is the reason

    def after(self, step: int, wish: int | None) -> int | None:
        """The signal for which all stop after this step, or None. `wish` is the signal that this process has received;
        0 for another reason.

        Process 0 names the step before it starts it. No process can be more than one step ahead of it, since a step's
        numbers come from all: so all learn of it in time.
        """
        this = launch.this()
        if this.count == 1:
            return wish
        client, wishes, decision = launch.client(), f"{self._place}/wishes/", f"{self._place}/last/"
        if wish is not None and not self._wished:
            self._wished = True
            client.key_value_set(f"{wishes}{this.index}", str(wish))
        if self._last is None and this.is_first and (found := client.key_value_dir_get(wishes)):
            self._last = step + 2, int(found[0][1])
            client.key_value_set(f"{decision}step", "{} {}".format(*self._last))
        elif self._last is None and (found := client.key_value_dir_get(decision)):
            last, number = map(int, found[0][1].split())
            self._last = last, number
        return self._last[1] if self._last is not None and step >= self._last[0] else None


def _in_words(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
