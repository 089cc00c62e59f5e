"""One process of a run: `python -m tests.mesh.process FOLDER INDEX COUNT PORT`, as `tests/test_processes.py` starts it.

Each does the same things and writes what it found to FOLDER/found-INDEX.json. At the end the last process kills itself
in the middle of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxmoe.cli import progress
from jaxmoe.distributed import ending, launch
from jaxmoe.distributed.agreement import check_agreement, exchange_values
from jaxmoe.errors import UserError

STEPS = 6
HEARTBEAT = 10


def settings(folder: pathlib.Path, output: str, **further: Any) -> Any:
    """The settings of a small run in FOLDER/OUTPUT, which continues one that is there."""
    from jaxmoe.train.settings import TrainConfig

    target = folder / output
    chosen: dict[str, Any] = {"lora_targets": ("attention", "experts"), "lora_r": 2, "learning_rate": 1e-3}
    chosen |= {"max_steps": STEPS, "batch_size": 4, "accumulation": 2, "seq_length": 32, "save_every": 1}
    chosen |= {"log_every": 1, "tensorboard": False, "resume": target.exists()} | further
    return TrainConfig(model=folder / "model", data=folder / "data.jsonl", output=target, **chosen)


def refused(action: Callable[[], object]) -> str:
    """The message with which an action is refused; empty if it is not."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def read_twice() -> Iterator[None]:
    """A fault: the second half of every batch holds the sequences of the first."""
    from jaxmoe.data.packing import Sequences

    right = Sequences.batch

    def wrong(self: Any, step: int, shape: tuple[int, ...], *_: Any) -> Any:
        batch, half = right(self, step, shape), shape[-1] // 2
        return batch._replace(
            **{
                name: np.concatenate([array[:, :half]] * 2, axis=1)
                for name, array in batch._asdict().items()
                if array is not None
            }
        )

    Sequences.batch = wrong  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        Sequences.batch = right


def main(folder: pathlib.Path, index: int, count: int) -> None:
    """All that a process does."""
    from jaxmoe.train.loop import train

    last = index == count - 1

    def signalled(numbers: dict[str, Any], number: int, at: int) -> None:
        if last and numbers["step"] == at:
            os.kill(os.getpid(), number)

    found: dict[str, Any] = {
        "exchanged": exchange_values({"from": index}),
        "differing facts": refused(lambda: check_agreement({"colour": "red", "size": index})),
    }
    stopped = train(settings(folder, "several", mesh=f"data={count}"), lambda n: signalled(n, signal.SIGTERM, at=1))
    found["stopped"] = [stopped["stopped_by"], stopped["steps"]]
    done = train(settings(folder, "several", mesh=f"expert={count}"))
    found["done"] = [done["stopped_by"], done["steps"]]
    with read_twice():
        train(settings(folder, "read twice", mesh=f"data={count}"))
    other = settings(folder, "other", mesh=f"data={count}", learning_rate=1e-3 * (1 + index))
    found["differing settings"] = refused(lambda: train(other))
    (folder / f"found-{index}.json").write_text(json.dumps(found))
    train(settings(folder, "killed", mesh=f"data={count}"), lambda n: signalled(n, signal.SIGKILL, at=3))


if __name__ == "__main__":
    where, me, of, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    flags = argparse.Namespace(coordinator=f"127.0.0.1:{port}", num_processes=of, process_id=me, heartbeat=HEARTBEAT)
    if not launch.start(flags).is_first:
        progress.hide()
    with ending.together():
        main(where, me, of)
