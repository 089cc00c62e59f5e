"""The record of a run: what its output folder says about it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import read_json
from jaxmoe.runs.history import METRICS_FILE, History, complete_lines, is_list_of_numbers, read_line

RUN_FILE = "train_config.json"
SAMPLES_FILE = "samples.jsonl"
LOAD_FILE = "expert_load.json"


class Sample(NamedTuple):
    """What a model wrote after a prompt, after so many steps."""

    step: int
    prompt: str
    text: str


class ExpertLoad(NamedTuple):
    """Each expert's share of its MoE layer's routed rows at one step, times the number of experts: 1 is even."""

    step: int
    load: Float[np.ndarray, "Ls E"]

    @classmethod
    def of(cls, step: int, counts: Int[np.ndarray, "Ls E"]) -> ExpertLoad:
        """The load in routed rows per layer and expert; 0 in a layer that received nothing."""
        return cls(step, counts.shape[1] * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))

    def as_json(self) -> dict[str, Any]:
        """The content of expert_load.json."""
        return {"step": self.step, "load": [[round(float(value), 4) for value in layer] for layer in self.load]}


class Change(NamedTuple):
    """An entry in which a resumed run differs, from a step on."""

    after_step: int
    name: str
    before: Any
    now: Any


class Lowest(NamedTuple):
    """The evaluation with the lowest held-out loss after the first step."""

    loss: float
    step: int


@dataclass
class RunRecord:
    """A run, as its folder tells."""

    folder: pathlib.Path
    settings: dict[str, Any] = field(default_factory=dict)
    total_steps: int | None = None
    device: str = ""
    versions: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    history: History = field(default_factory=History)
    samples: list[Sample] = field(default_factory=list)
    load: ExpertLoad | None = None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return int(self.history.last("step") or 0)

    def held_out(self) -> tuple[float | None, float | None, Lowest | None]:
        """The held-out loss before the first step, the last one, and the lowest after a step."""
        steps, losses = self.history.steps(), self.history.column("eval_loss")
        evaluated = np.isfinite(losses)
        steps, losses = steps[evaluated], losses[evaluated]
        before = float(losses[0]) if len(losses) and steps[0] == 0 else None
        after, steps = losses[steps > 0], steps[steps > 0]
        if not len(after):
            return before, before, None
        return before, float(after[-1]), Lowest(float(after.min()), int(steps[after.argmin()]))

    def speed(self) -> float | None:
        """Tokens per second: the median over all rows."""
        speeds = self.history.column("tokens_per_second")
        return float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None


def is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / RUN_FILE).is_file()


def read_run(folder: pathlib.Path) -> RunRecord:
    """Reads the record of a run.

    Raises:
        UserError: the folder is none of a run, or one of its files is damaged.
    """
    if not is_run(folder):
        raise UserError(f"{folder}: expected the folder of a run, found no {RUN_FILE} in it")
    raw = read_json(folder / RUN_FILE)
    total = _object(raw.get("identity")).get("max_steps")
    return RunRecord(
        folder,
        settings=_object(raw.get("settings")),
        total_steps=total if type(total) is int else None,
        device=str(raw.get("device") or ""),
        versions=_object(raw.get("versions")),
        changes=list(_changes(raw.get("changes"))),
        history=History.read(folder / METRICS_FILE),
        samples=list(read_samples(folder)),
        load=_read_load(folder / LOAD_FILE),
    )


def read_samples(folder: pathlib.Path) -> Iterable[Sample]:
    """What the model wrote after fixed prompts.

    Raises:
        UserError: a line that is none of a run's.
    """
    path = folder / SAMPLES_FILE
    for number, line in complete_lines(path):
        raw = read_line(line, f"{path}:{number}")
        prompt, text = raw.get("prompt"), raw.get("text")
        if not isinstance(prompt, str) or not isinstance(text, str):
            raise UserError(f"{path}:{number}: expected an object with step, prompt and text, found {shown(raw)}")
        yield Sample(raw["step"], prompt, text)


def _read_load(path: pathlib.Path) -> ExpertLoad | None:
    if not path.exists():
        return None
    raw = read_json(path)
    step, layers = raw.get("step"), raw.get("load")
    rows = layers if isinstance(layers, list) and all(map(is_list_of_numbers, layers)) else []
    if type(step) is not int or len({len(layer) for layer in rows}) != 1:
        raise UserError(f"{path}: expected a step and the load of each layer's experts, found {shown(raw)}")
    return ExpertLoad(step, np.asarray(rows, np.float64))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _changes(value: Any) -> Iterable[Change]:
    for change in value if isinstance(value, list) else []:
        change = dict(_object(change))
        step = change.pop("after_step", None)
        for name, pair in change.items():
            if type(step) is int and isinstance(pair, list) and len(pair) == 2:
                yield Change(step, name, *pair)
