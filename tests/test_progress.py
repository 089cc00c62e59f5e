"""The progress of long jobs: a bar on a terminal, erased at the end, and lines elsewhere."""

from __future__ import annotations

import io
import logging
import re
import sys
from typing import Any

import pytest

from jaxmoe.cli import notices, progress


def test_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.reading_weights() as on_layer:
        for layer in range(1, 5):
            clock[0] += 3.0
            on_layer(layer, 4)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["reading the weights: 2 of 4 layers", "reading the weights: 4 of 4 layers"]
    assert printed.err == ""


def test_what_is_quick_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress("reading") as show:
        show(1, 2, "half")
    assert capsys.readouterr() == ("", "")


def test_lines_go_where_they_are_sent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.progress("reading", on_stderr=True) as show:
        show(1, 2, "half")
    assert capsys.readouterr() == ("", "reading: half\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal: Any = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress.progress("reading [x].jsonl") as show:
        show(1, 2, "half")
    shown = terminal.getvalue()
    assert "reading [x].jsonl" in shown and "half" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased at the end
    assert capsys.readouterr().out == ""


def test_training_on_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = progress.TrainingProgress(total=10, done=0)
    numbers = {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": None}
    shown.step(numbers | {"step": 1}, logged=True)
    shown.step(numbers | {"step": 2, "tokens_per_second": 1234.0}, logged=False)
    shown.step(numbers | {"step": 3, "tokens_per_second": 1234.0}, logged=True)
    shown.close()
    first, third = capsys.readouterr().out.splitlines()
    assert first == "step 1/10  loss 1.5000  lr 1.00e-03  grad norm 0.500"
    assert third.startswith("step 3/10  loss 1.5000  lr 1.00e-03  grad norm 0.500  1,234 tokens/s  0:00 left")


def test_training_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal: Any = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = progress.TrainingProgress(total=10, done=0)
    numbers = {"loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 1234.0}
    shown.step(numbers | {"step": 3}, logged=False)
    shown.say("step 3/10  held-out loss [1]")
    with notices.shown_notices():
        logging.getLogger("jaxmoe").info("a notice [2]")
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "0/10 compiling" in text and "loss 1.5000" in text and "1,234 tokens/s" in text and "3/10" in text
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    assert "step 3/10  held-out loss [1]" in lines and "a notice [2]" in lines


def test_notices_are_plain_lines(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("jaxmoe")
    with notices.shown_notices():
        logger.info("one")
        logger.debug("not this")
        with notices.shown_notices():
            logging.getLogger("jaxmoe.train").warning("two, once")
    with notices.shown_notices(on_stderr=True):
        logger.info("three")
    assert capsys.readouterr() == ("one\ntwo, once\n", "three\n")
    assert (logger.handlers, logger.propagate, logger.level) == ([], True, logging.NOTSET)


def test_notices_leave_a_programs_own_handler_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records: list[str] = []
    own = logging.Handler()
    monkeypatch.setattr(own, "emit", lambda record: records.append(record.getMessage()))
    logger = logging.getLogger("jaxmoe")
    logger.addHandler(own)
    try:
        with notices.shown_notices():
            logger.warning("mine")
    finally:
        logger.removeHandler(own)
    assert records == ["mine"]
    assert capsys.readouterr() == ("", "")
