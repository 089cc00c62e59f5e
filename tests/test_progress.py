"""What long jobs show: lines elsewhere than on a terminal, a bar on one, nothing that stays."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from jaxmoe.cli import progress


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
