"""Flipped bits in training checkpoints: a damaged checkpoint is refused, or gives the same bits.

`python -m reliability.bit_flips --number 300 --seed 0 --jobs 4`. Each trial copies a checkpoint, flips one bit, a few
bits or a byte of one file, and restores it.
"""

from __future__ import annotations

import contextlib
import pathlib
import random
import shutil
import sys
from typing import Any

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.store.train_state import TrainCheckpoints
from reliability.trials import Outcome, run_trials

METADATA = {"eval_loss_before": 3.25}


def state() -> dict[str, Any]:
    """A state with arrays of several sizes and dtypes."""
    numbers = np.random.default_rng(0)
    arrays = {f"a{i}": numbers.standard_normal((8 << i, 16)).astype(np.float32) for i in range(6)}
    return arrays | {"small": np.arange(5, dtype=np.int32), "zeros": np.zeros((64, 64), np.float32)}


def prepare(shared: pathlib.Path) -> None:
    """Writes two checkpoints."""
    checkpoints = TrainCheckpoints(shared / "checkpoints")
    for step in (10, 20):
        checkpoints.save(step, state() | {"step": np.asarray(step)}, METADATA)
    checkpoints.close()


def flip(file: pathlib.Path, rng: random.Random) -> str:
    """Flips one bit, up to four bits, or all bits of one byte; returns what was done."""
    data = bytearray(file.read_bytes())
    how = rng.choice(("one bit", "a few bits", "a byte"))
    for _ in range(rng.randint(2, 4) if how == "a few bits" else 1):
        data[rng.randrange(len(data))] ^= 255 if how == "a byte" else 1 << rng.randrange(8)
    file.write_bytes(data)
    return how


def trial(own: pathlib.Path, shared: pathlib.Path, index: int, rng: random.Random) -> Outcome:
    """Damages one file of the newest checkpoint and restores it."""
    folder = own / "checkpoints"
    shutil.copytree(shared / "checkpoints", folder)
    files = sorted(file for file in (folder / "20").rglob("*") if file.is_file() and file.stat().st_size)
    file = rng.choice(files)
    kind = flip(file, rng)
    where = str(file.relative_to(folder))
    expected = state() | {"step": np.asarray(20)}
    try:
        with contextlib.closing(TrainCheckpoints(folder)) as checkpoints:
            restored = checkpoints.restore_latest(expected)
    except UserError as error:
        named = str(folder / "20") in str(error) and "--resume-from" in str(error)
        return Outcome("refused" if named else "wrong", kind, f"{where}: {error}")
    if restored is None or restored[0] == 10:
        return Outcome("wrong", kind, f"{where}: another checkpoint was restored silently")
    step, found, metadata = restored
    same = all(np.asarray(found[name]).tobytes() == array.tobytes() for name, array in expected.items())
    if (step, metadata) != (20, METADATA) or not same:
        return Outcome("wrong", kind, f"{where}: other numbers were restored")
    return Outcome("accepted", kind)


if __name__ == "__main__":
    sys.exit(run_trials(trial, prepare, description=str(__doc__), number=300))
