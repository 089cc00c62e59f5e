"""The page of a run in progress, OUTPUT/report.html, and the samples on it: rewritten at each evaluation."""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.runs.record import LOAD_FILE, SAMPLES_FILE, ExpertLoad, Sample, read_run
from jaxmoe.runs.report import REPORT_FILE, write_report
from jaxmoe.store.files import output_file
from jaxmoe.store.items import first_line

_log = logging.getLogger("jaxmoe")


class RunPage:
    """The record of a run, which grows with it."""

    def __init__(self, output: pathlib.Path, keep_to: int) -> None:
        """Reads what the folder tells so far; what belongs to steps above `keep_to` is that of a run that did not go
        on."""
        self._run = read_run(output)
        if self._run.load is not None and self._run.load.step > keep_to:
            self._run.load = None
        self._draws = True
        self._run.samples = [sample for sample in self._run.samples if sample.step <= keep_to]
        if (output / SAMPLES_FILE).exists():  # a killed run may have left half a line
            with output_file(output / SAMPLES_FILE) as draft:
                draft.write_text("".join(map(_line, self._run.samples)), encoding="utf-8")

    def add(self, numbers: Mapping[str, Any], load: ExpertLoad | None = None) -> None:
        """Adds one line of metrics.jsonl, and what it says of the load expert by expert."""
        self._run.history.add(numbers)
        self._run.load = load or self._run.load

    def draw(self, samples: Sequence[Sample] = ()) -> None:
        """Adds samples and writes the page. A page that cannot be drawn is no reason to end the run; a full disk is."""
        if samples:
            self._run.samples += samples
            with (self._run.folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.writelines(map(_line, samples))
        if self._run.load is not None:
            with output_file(self._run.folder / LOAD_FILE) as draft:
                draft.write_text(json.dumps(self._run.load.as_json()) + "\n", encoding="utf-8")
        if not self._draws:
            return
        try:
            write_report([self._run], self._run.folder / REPORT_FILE)
        except OSError:
            raise
        except Exception as error:
            self._draws = False
            _log.warning(f"{REPORT_FILE}: not drawn from here on: {type(error).__name__}: {first_line(error)}")


def _line(sample: Sample) -> str:
    return json.dumps(sample._asdict()) + "\n"
