"""The page that shows a run, or several: one file, offline, light and dark."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from jaxmoe.figures.html_page import page
from jaxmoe.runs.plots import of_runs
from jaxmoe.runs.record import RunRecord
from jaxmoe.store.files import output_file

REPORT_FILE = "report.html"
ABOUT = ("run", "model", "data", "steps", "loss", "held-out loss", "lowest held-out loss", "tokens/s", "device")


def write_report(runs: Sequence[RunRecord], path: pathlib.Path) -> None:
    """Writes the page about a run, or about several beside each other; the file changes all at once."""
    names = distinct_names(runs)
    title = f"Run {names[0]}" if len(runs) == 1 else f"Runs {', '.join(names)}"
    lines = [[name, *about(run)] for name, run in zip(names, runs, strict=True)]
    content = page(title, ABOUT, lines, of_runs(runs, names), without_script="The page's script draws the figures.")
    with output_file(path) as draft:
        draft.write_text(content, encoding="utf-8", errors="backslashreplace")


def distinct_names(runs: Sequence[RunRecord]) -> list[str]:
    """The names of the runs' folders; their paths, if two have the same name."""
    names = [run.name for run in runs]
    return names if len({*names}) == len(names) else [str(run.folder) for run in runs]


def about(run: RunRecord) -> list[str]:
    """The cells of one run, in the order of `ABOUT` without its name."""
    before, after, lowest = run.held_out()
    held_out = _number(after) if before is None or before == after else f"{_number(before)} to {_number(after)}"
    speed = run.speed()
    return [
        str(run.settings.get("model") or run.settings.get("from_scratch") or ""),
        _paths(run.settings.get("data")),
        f"{run.step:,}" + ("" if run.total_steps is None else f" of {run.total_steps:,}"),
        _number(run.history.last("loss")),
        held_out,
        "" if lowest is None else f"{_number(lowest.loss)} at step {lowest.step:,}",
        "" if speed is None else f"{speed:,.0f}",
        run.device,
    ]


def _paths(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
