"""The plan that every process reads: which cases to run, and how and where their arrays are written.

A plan is a folder with `plan.json`. The sides add `arrays/CASE/SIDE.RUN.safetensors`, and `SIDE.json` with the versions
and the device that each ran on.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.parity.batches import Batch

Device = Literal["cpu", "gpu"]
SIDES = ("exact", "transformers", "torch_ref", "jaxmoe")


@dataclass(frozen=True)
class Case:
    """One model as every side loads it, and what is run with it.

    Attributes:
        name: a word that files and reports use.
        checkpoint: a folder in HF form, in 16 or 32 bit.
        dtype: the dtype in which the sides compute; the oracle rounds the weights to it and computes in float64.
        batch: a file of `write_batch`.
        quantized: a folder with the same model in NF4 or FP8, one key per expert; the sides read its bytes.
        adapter: a PEFT folder, applied in every run.
        runs: some of "free", "pinned" (the oracle's experts, each side's own weights), "gradients" (pinned; needs an
            adapter) and "trace" (free, with every operation of every layer recorded).
        faults: negative controls from `tests.parity.faults` that jaxmoe also runs.
        flip_bound: entry of the tolerance table for the margin above which no choice may flip; None: the bound that
            transformers needs in the same run.
        draws: how many gradients are computed, each of the loss of another equal part of the batch's tokens. In 16 bit
            the distance of a single one from float64 depends on how a few large entries are rounded.
        mesh: the devices that jaxmoe runs it on; on a CPU they are virtual.
        rows_in_fp8: the experts' products take rows in FP8, too; only with weights in FP8, and only in forward passes.
        pinned_kl: entry of the tolerance table that limits jaxmoe's pinned KL in 16 bit; None: it is only reported.
    """

    name: str
    checkpoint: str
    dtype: str
    batch: str
    quantized: str | None = None
    adapter: str | None = None
    runs: tuple[str, ...] = ("free", "pinned")
    faults: tuple[str, ...] = ()
    flip_bound: str | None = None
    pinned_kl: str | None = None
    rows_in_fp8: bool = False
    aux_coefficient: float = 0.1
    learning_rate: float = 1e-3
    draws: int = 1
    mesh: str = "data=1"

    @property
    def gradient_runs(self) -> list[str]:
        """The run "gradients" by draw: the name of each draw's file."""
        return ["gradients"] if self.draws == 1 else [f"gradients.{draw}" for draw in range(self.draws)]


@dataclass(frozen=True)
class Plan:
    """The cases of one run of the suite, and its folder."""

    folder: pathlib.Path
    device: Device
    cases: tuple[Case, ...] = ()
    command: str = ""
    sides: tuple[str, ...] = field(default=SIDES)

    def write(self) -> None:
        """Writes the plan into its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "device": self.device,
            "command": self.command,
            "sides": self.sides,
            "cases": [asdict(case) for case in self.cases],
        }
        (self.folder / "plan.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: pathlib.Path) -> Plan:
        """The plan in `folder`."""
        raw = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        cases = tuple(
            Case(**case | {"runs": tuple(case["runs"]), "faults": tuple(case["faults"])}) for case in raw["cases"]
        )
        return cls(folder, raw["device"], cases, raw["command"], tuple(raw["sides"]))

    def path(self, case: Case, side: str, run: str) -> pathlib.Path:
        """The file with one side's arrays of one run."""
        return self.folder / "arrays" / case.name / f"{side}.{run}.safetensors"

    def save(self, case: Case, side: str, run: str, arrays: Mapping[str, Any]) -> None:
        """Writes the arrays of one run, whole or not at all."""
        path = self.path(case, side, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, arrays)

    def load(self, case: Case, side: str, run: str) -> dict[str, np.ndarray]:
        """The arrays of one run."""
        return load_file(self.path(case, side, run))

    def oracle_experts(self, case: Case) -> np.ndarray | None:
        """The oracle's choice [Ls, B, T, k], to which a run is pinned; None if there is none."""
        return self.load(case, "exact", "free").get("selected") if self.has(case, "exact", "free") else None

    def has(self, case: Case, side: str, run: str) -> bool:
        """Whether that run was made."""
        return self.path(case, side, run).is_file()


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes a safetensors file: first under a temporary name, then it is renamed."""
    # safetensors writes the memory of a view in its own order, so every array must be contiguous
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(whole, beside)
    beside.replace(path)


def write_batch(path: pathlib.Path, batch: Batch) -> pathlib.Path:
    """Writes a batch for the sides. It has no padding, because transformers handles that differently from documents."""
    assert batch.valid.all(), "expected a batch without padding"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, batch._asdict())
    return path


def read_batch(path: str) -> Batch:
    """The inverse of `write_batch`."""
    return Batch(**load_file(path))


def run_cases(plan: Plan, side: str, run: Callable[[Case], None]) -> int:
    """Runs every case; if one fails, its traceback is printed and the others still run.

    Returns the number of failed cases.
    """
    failed = 0
    for case in plan.cases:
        start = time.monotonic()
        try:
            run(case)
        except Exception:
            traceback.print_exc()
            failed += 1
        log(side, f"{case.name}: {time.monotonic() - start:.1f} s")
    return failed


def log(side: str, text: str) -> None:
    """One line of progress on stdout."""
    print(f"[{side}] {text}", flush=True)
