"""Tokens per second of a run whose steps are started ahead and finish later on the device.

A loop that starts steps ahead cannot tell when one is done: starting a step may return at once, or wait until the
device has worked through most of it. So a thread waits for each step's numbers and notes the time.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax


class Arrived(NamedTuple):
    """A step's numbers on the host, and when they arrived there (`time.perf_counter`)."""

    numbers: Any
    when: float


class Arrivals:
    """Waits, in a thread, for the numbers of steps in the order in which they were started."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="arrivals")

    def expect(self, numbers: Any) -> Future[Arrived]:
        """A future for a pytree of arrays that the device still works on."""
        return self._pool.submit(self._fetch, numbers)

    def _fetch(self, numbers: Any) -> Arrived:
        fetched = jax.device_get(numbers)
        return Arrived(fetched, time.perf_counter())

    def close(self) -> None:
        """Ends the thread once all expected numbers have arrived."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Speed:
    """Tokens per second since a mark: the last report, or the end of an interruption.

    The first step, which may wait for the compiler, sets the first mark and has no speed.
    """

    def __init__(self) -> None:
        self._mark: float | None = None
        self._tokens = 0

    def completed(self, when: float, tokens: int) -> float | None:
        """The speed up to a step of `tokens` tokens that was completed at `when` (seconds)."""
        if self._mark is None:
            self.restart(when)
            return None
        self._tokens += tokens
        return self._tokens / max(when - self._mark, 1e-9)

    def restart(self, when: float) -> None:
        """Sets the mark at `when`: the time of a completed step, or of the end of an interruption."""
        self._mark, self._tokens = when, 0
