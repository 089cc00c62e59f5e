"""How fast tokens arrive."""

from __future__ import annotations

import time
from collections.abc import Callable

from jaxmoe.errors import counted


class Speed:
    """Counts tokens and their time, over one answer or several.

    The first token of an answer waits for the prompt, and the second may wait for a compilation. The rate is that of
    the tokens after these two.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.tokens = 0
        self._start = self._second = self._last = clock()
        self._first_after = 0.0
        self._in_answer = 0
        self._timed_before = 0, 0.0  # tokens and seconds of the answers before this one

    def start(self) -> None:
        """An answer begins."""
        (tokens, seconds), (more, longer) = self._timed_before, self._timed()
        self._timed_before = tokens + more, seconds + longer
        self._start = self._second = self._last = self._clock()
        self._in_answer = 0

    def count(self) -> None:
        """A token has arrived."""
        self._last = self._clock()
        self.tokens += 1
        self._in_answer += 1
        if self._in_answer == 1:
            self._first_after = self._last - self._start
        if self._in_answer <= 2:
            self._second = self._last

    def of_answer(self) -> str:
        """The tokens of the last answer, and how long the first one took."""
        rate = self._rate(self._timed())
        words = f"{counted(self._in_answer, 'token')}, the first after {self._first_after:.2f} s"
        return words if rate is None else f"{words}, then {rate}"

    def __str__(self) -> str:
        """All tokens, and the rate of those that are timed."""
        (tokens, seconds), (more, longer) = self._timed_before, self._timed()
        rate = self._rate((tokens + more, seconds + longer))
        return counted(self.tokens, "token") + ("" if rate is None else f", {rate}")

    def _timed(self) -> tuple[int, float]:
        return max(0, self._in_answer - 2), self._last - self._second

    def _rate(self, timed: tuple[int, float]) -> str | None:
        tokens, seconds = timed
        return f"{tokens / seconds:,.1f} tokens/s" if tokens and seconds > 0 else None
