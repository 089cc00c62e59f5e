"""The numbers of a run: the lines of metrics.jsonl, thinned so that a run of any length fits into memory and a page."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxmoe.errors import UserError, is_finite, shown
from jaxmoe.json_text import parse_json
from jaxmoe.store.files import is_file

METRICS_FILE = "metrics.jsonl"
MAX_LINE = 2**20  # characters; a line of a model with a hundred layers has a few thousand
MOST_ROWS = 2000  # that a history keeps; a page is about as many dots wide

Row = dict[str, Any]  # name -> number, or one number per MoE layer


def complete_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(number, line) for the lines that end with a newline: a killed run may leave half a line behind.

    Raises:
        UserError: a line that is too long, or something whose reading may never end.
    """
    if not is_file(path):
        return
    with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), start=1):
            if len(line) > MAX_LINE:
                raise UserError(f"{path}:{number}: expected a line of at most {MAX_LINE:,} characters, found more")
            if line.endswith("\n"):
                yield number, line


def read_line(line: str, where: str) -> Row:
    """A line of a run's JSONL files: an object with the step that it belongs to.

    Raises:
        UserError: the line is another one.
    """
    raw = parse_json(line, where)
    step = raw.get("step") if isinstance(raw, dict) else None
    if type(step) is not int or not 0 <= step < 2**63:
        raise UserError(f"{where}: expected an object with a step, found {shown(raw)}")
    return raw


class _Thinned:
    """The rows of one kind, of which every `every`th is kept, with their places among all rows."""

    def __init__(self) -> None:
        self.every = 1
        self.rows: list[tuple[int, Row]] = []
        self._count = 0

    def add(self, place: int, row: Row) -> None:
        if self._count % self.every == 0:
            self.rows.append((place, row))
        self._count += 1
        if len(self.rows) > MOST_ROWS // 2:
            self.every *= 2
            self.rows = self.rows[::2]


class History:
    """The rows of a run, in order. Of a long run every second, fourth, ... row is kept, and the last one; rows of
    evaluations, or with measures of the routing, are counted by themselves."""

    def __init__(self) -> None:
        self._steps, self._evaluations = _Thinned(), _Thinned()
        self._last: tuple[int, Row] | None = None
        self._count = 0

    @property
    def every(self) -> int:
        """How many rows without an evaluation there are for each that is kept."""
        return self._steps.every

    @classmethod
    def read(cls, path: pathlib.Path) -> History:
        """The history in a metrics.jsonl; an empty one if there is no file.

        Raises:
            UserError: a line that is none of a run's.
        """
        history = cls()
        for number, line in complete_lines(path):
            history.add(read_line(line, f"{path}:{number}"))
        return history

    def add(self, numbers: Mapping[str, Any]) -> None:
        """Adds the numbers of one step; what is no number is left out."""
        row = {name: value for name, value in numbers.items() if is_finite(value) or is_list_of_numbers(value)}
        measured = "eval_loss" in row or "routing_changed" in row
        (self._evaluations if measured else self._steps).add(self._count, row)
        self._last = self._count, row
        self._count += 1

    @property
    def rows(self) -> list[Row]:
        """The rows that are kept, with the last one."""
        places = dict([*self._steps.rows, *self._evaluations.rows, *filter(None, [self._last])])
        return [places[place] for place in sorted(places)]

    def names(self, *, per_layer: bool) -> list[str]:
        """The names of numbers, or of those that are given for each layer, besides the step."""
        found: dict[str, None] = {}
        for row in self.rows:
            found |= {name: None for name, value in row.items() if isinstance(value, list) == per_layer}
        return [name for name in found if name != "step"]

    def steps(self) -> Float[np.ndarray, " rows"]:
        """The step of each row."""
        return self.column("step")

    def column(self, name: str) -> Float[np.ndarray, " rows"]:
        """A number of each row; NaN where it has none."""
        values = (row.get(name) for row in self.rows)
        return np.asarray([value if isinstance(value, int | float) else np.nan for value in values], np.float64)

    def matrix(self, name: str) -> Float[np.ndarray, "rows layers"]:
        """A number of each row and layer; NaN where a row has none."""
        values = [value if isinstance(value := row.get(name), list) else [] for row in self.rows]
        found = np.full((len(values), max(map(len, values), default=0)), np.nan)
        for row, line in enumerate(values):
            found[row, : len(line)] = line
        return found

    def last(self, name: str) -> float | None:
        """The number in the last row that has it."""
        return next((row[name] for row in reversed(self.rows) if isinstance(row.get(name), int | float)), None)


def is_list_of_numbers(value: Any) -> bool:
    """Whether a JSON value is a list of finite numbers, at least one."""
    return isinstance(value, list) and bool(value) and all(map(is_finite, value))
