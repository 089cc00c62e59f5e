"""Where the numbers of a training run go: metrics.jsonl, TensorBoard, and the terminal."""

from __future__ import annotations

import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
from jaxtyping import Int

METRICS_FILE = "metrics.jsonl"


def expert_load(counts: Int[np.ndarray, "Ls E"]) -> dict[str, list[float]]:
    """How evenly each MoE layer spreads its routed rows over its experts.

    `expert_load_cv` is the standard deviation over the mean (0 is even), `expert_load_entropy` the entropy of the
    shares over log E (1 is even); one value per layer, both 0 for a layer that received nothing.
    """
    total = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(total, 1)
    logarithm = np.log(share, where=share > 0, out=np.zeros_like(share))
    experts = counts.shape[1]
    return {
        "expert_load_cv": (share.std(axis=1) * experts).tolist(),
        "expert_load_entropy": (-(share * logarithm).sum(axis=1) / np.log(max(experts, 2))).tolist(),
    }


class MetricsLog:
    """Appends one JSON object per logged step to OUTPUT/metrics.jsonl and the same numbers to OUTPUT/tensorboard.

    A resumed run first drops what a stopped one wrote behind its last checkpoint (`keep_to`), so that both together
    read as one run that never stopped.
    """

    def __init__(self, folder: pathlib.Path, *, keep_to: int, tensorboard: bool) -> None:
        path = folder / METRICS_FILE
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= keep_to]
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(path)
        self.notice: str | None = None
        self._file = path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                self.notice = f"TensorBoard files are not written: tensorboardX is not installed ({METRICS_FILE} is)"
            else:
                self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_to + 1 if kept else None)

    def write(self, row: dict[str, Any]) -> None:
        """Writes one step's numbers (a list is one value per MoE layer) and flushes the file."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                values = enumerate(value) if isinstance(value, list) else [(None, value)]
                for layer, number in values:
                    if name != "step" and number is not None:
                        tag = name if layer is None else f"{name}/layer_{layer:02d}"
                        self._board.add_scalar(tag, number, row["step"])
            self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class Progress:
    """A progress bar with loss, tokens/s and time left on a terminal; one plain line per logged step elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._start: tuple[float, int] | None = None  # time and step from which on the pace is measured
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = [
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
            self._bar = Bar(*columns)
            self._task = self._bar.add_task("", total=total, completed=done, loss="-", speed="-")
            self._bar.start()

    def step(self, row: dict[str, Any], *, logged: bool) -> None:
        """Shows one finished step; `row` as in metrics.jsonl."""
        if self._start is None:
            self._start = time.perf_counter(), row["step"]  # the first step is mostly compilation
        start, first = self._start
        done, speed = row["step"], row["tokens_per_second"]
        shown = "-" if speed is None else f"{speed:,.0f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, loss=f"{row['loss']:.4f}", speed=shown)
        elif logged:
            line = f"step {done}/{self._total}  loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}"
            line += f"  grad norm {row['grad_norm']:.3f}  {shown} tokens/s"
            if done > first:
                pace = (time.perf_counter() - start) / (done - first)
                line += f"  {_clock(pace * (self._total - done))} left"
            print(line, flush=True)

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _complete_lines(path: pathlib.Path) -> list[str]:
    """The lines that end with a newline: a killed run may leave half a line behind."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
