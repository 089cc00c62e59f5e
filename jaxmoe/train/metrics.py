"""The numbers of a training run on disk (metrics.jsonl), and how evenly experts are loaded."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxmoe.runs.history import METRICS_FILE, complete_lines, read_line
from jaxmoe.train.trackers import Ended, Trackers


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


def device_load(counts: Int[np.ndarray, "Ls E"], devices: int) -> dict[str, list[float]]:
    """How unevenly the devices of the mesh's `expert` axis are loaded: in each MoE layer, the routed rows of the device
    that receives most over the mean (1 is even). Nothing if one device holds all experts."""
    if devices == 1:
        return {}
    rows = counts.reshape(len(counts), devices, -1).sum(axis=2)
    return {"device_load_max": (rows.max(axis=1) / np.maximum(rows.mean(axis=1), 1)).tolist()}


def scalars(numbers: Mapping[str, Any]) -> dict[str, float]:
    """A step's numbers as trackers take them: name -> number; a list becomes `name/layer_00` and so on."""
    found = {}
    for name, value in numbers.items():
        values = enumerate(value) if isinstance(value, list) else [(None, value)]
        for layer, number in values:
            if name != "step" and number is not None:
                found[name if layer is None else f"{name}/layer_{layer:02d}"] = number
    return found


class MetricsLog:
    """Appends one JSON object per logged step to OUTPUT/metrics.jsonl and tells the trackers the same numbers.

    A resumed run first drops what a stopped one wrote after its last checkpoint (steps above `keep_to`), so that both
    together read as one run that never stopped.
    """

    def __init__(self, folder: pathlib.Path, *, keep_to: int) -> None:
        path = folder / METRICS_FILE
        kept = [line for number, line in complete_lines(path) if read_line(line, f"{path}:{number}")["step"] <= keep_to]
        draft = path.with_suffix(".tmp")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._trackers: Trackers | None = None

    def also(self, trackers: Trackers) -> None:
        """From now on `trackers` are told the same, and closed with the file."""
        self._trackers = trackers

    def write(self, numbers: dict[str, Any]) -> None:
        """Writes one step's numbers (a list has one value per MoE layer) and flushes the file."""
        self._file.write(json.dumps(numbers) + "\n")
        self._file.flush()
        if self._trackers is not None:
            self._trackers.write(numbers["step"], scalars(numbers))

    def close(self, ended: Ended = "done") -> None:
        """Closes the file, and tells the trackers how the run ended."""
        self._file.close()
        if self._trackers is not None:
            self._trackers.close(ended)


class Unwritten:
    """A log that is not written: that of every process of a run but the first."""

    def also(self, trackers: Trackers) -> None:
        """Does nothing."""

    def write(self, numbers: dict[str, Any]) -> None:
        """Does nothing."""

    def close(self, ended: Ended = "done") -> None:
        """Does nothing."""
