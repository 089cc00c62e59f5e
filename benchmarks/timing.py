"""Timing several sides in one process, in turn."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Side(NamedTuple):
    """A call to time, and a function that waits for its result."""

    call: Callable[[], Any]
    wait: Callable[[Any], Any]


def seconds_in_turn(sides: dict[str, Side], queued: int = 10, rounds: int = 24, rest: float = 0.0) -> dict[str, float]:
    """Seconds per call: the median over the rounds of the mean over `queued` calls, launched without waiting.

    A round times every side once. `rest` is a pause in seconds before each side's calls; without it the load is steady,
    as in training. Each round has a random order (the same for the same arguments), so that no side always follows the
    one that heats the card most.
    """
    for side in sides.values():
        side.wait(side.call())
    times: dict[str, list[float]] = {name: [] for name in sides}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(sides), len(sides)):
            side = sides[name]
            time.sleep(rest)
            start = time.perf_counter()
            result = None
            for _ in range(queued):
                result = side.call()
            side.wait(result)
            times[name].append((time.perf_counter() - start) / queued)
    return {name: float(np.median(found)) for name, found in times.items()}
