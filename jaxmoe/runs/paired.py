"""Pairs of runs of the same seeds under two settings, A and B: differences with intervals, as a table and a page."""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.figures.html_page import page
from jaxmoe.runs.plots import of_runs
from jaxmoe.runs.record import RunRecord
from jaxmoe.store.files import output_file

TABLE_FILE, PAGE_FILE = "differences.csv", "differences.html"
HEADER = ("number", "A", "B", "B - A", "low", "high", "pairs")
# The speed of a run's last steps depends on what else the machine does, not on the seed.
_NOT_COMPARED = ("step", "learning_rate", "tokens_per_second")


class Difference(NamedTuple):
    """A number's means over the pairs, the mean of B - A, and the bounds of its 95 % interval (NaN for one pair)."""

    name: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    pairs: int


def last_numbers(run: RunRecord) -> dict[str, float]:
    """The numbers of a run's last row; of those that are given for each MoE layer, the mean."""
    row = run.history.rows[-1]
    return {name: float(np.mean(value)) for name, value in row.items() if name not in _NOT_COMPARED}


def differences(pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> list[Difference]:
    """B - A for every number that all runs have, the held-out loss first.

    The interval is that of Student's t for the mean of the pairs' differences: it says what another seed would change,
    not what other held-out records would.
    """
    names = [name for name in pairs[0][0] if all(name in numbers for pair in pairs for numbers in pair)]
    names.sort(key=lambda name: name != "eval_loss")
    found = []
    for name in names:
        a, b = (np.asarray([pair[side][name] for pair in pairs], np.float64) for side in (0, 1))
        middle, half = float(np.mean(b - a)), half_width(b - a)
        found.append(Difference(name, float(a.mean()), float(b.mean()), middle, middle - half, middle + half, len(a)))
    return found


def half_width(values: np.ndarray, level: float = 0.95) -> float:
    """Half the width of Student's interval for the mean of independent values: t s / sqrt(n); NaN for one value.

    Source: Student 1908.
    """
    from scipy.stats import t

    if len(values) < 2:
        return math.nan
    return float(t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def write_differences(
    folder: pathlib.Path,
    runs: Mapping[str, RunRecord],
    found: Sequence[Difference],
    settings: Mapping[str, tuple[str, str]],
) -> None:
    """Writes the table and the page with it, with the `settings` that differ (name -> those of A and B, in words), and
    with all runs beside each other, by their names."""
    with output_file(folder / TABLE_FILE) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEADER, *found])
    lines: list[list[Any]] = [[name, *values, *[""] * (len(HEADER) - 3)] for name, values in settings.items()]
    lines += [[name, *(f"{number:.6g}" for number in numbers), count] for name, *numbers, count in found]
    title = "B against A: means over pairs of runs, and 95 % intervals of the differences"
    figures = of_runs([*runs.values()], [*runs])
    content = page(title, HEADER, lines, figures, without_script="The page's script draws the figures.")
    with output_file(folder / PAGE_FILE) as draft:
        draft.write_text(content, encoding="utf-8", errors="backslashreplace")
