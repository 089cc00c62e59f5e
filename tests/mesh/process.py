"""One process of a run: `python -m tests.mesh.process SCENARIO FOLDER INDEX COUNT PORT`, as
`tests/mesh/test_several_processes.py` starts it.

All do the same things, and each writes what it found to FOLDER/SCENARIO-INDEX.json. At the end one process kills itself
in the middle of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxmoe.cli import progress
from jaxmoe.distributed import ending, launch
from jaxmoe.distributed.agreement import check_agreement, exchange_values
from jaxmoe.errors import UserError

STEPS = 12  # a signal after the first step of a run stops it several steps later
HEARTBEAT = 10
NF4 = {"quantize": "nf4"}
# AdamW's step of an entry with hardly any gradient is the sign of rounding errors, unless epsilon is larger.
ALL_PARAMETERS = {"full": True, "lora_targets": ("attention",), "lora_r": 16, "adam_epsilon": 1e-3}


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


def signalled(whose: int, number: int, after: int = 1) -> Callable[[dict[str, Any]], None]:
    """Sends the process `whose` this signal once the numbers of so many steps of the run are there."""
    seen: list[int] = []

    def on_step(numbers: dict[str, Any]) -> None:
        seen.append(numbers["step"])
        if launch.this().index == whose and len(seen) == after:
            os.kill(os.getpid(), number)

    return on_step


def run(folder: pathlib.Path, output: str, mesh: str, on_step: Any = lambda _: None, **further: Any) -> list[Any]:
    """Trains; returns the signal that stopped the run, and after which step it ended."""
    from jaxmoe.train.loop import train

    done = train(settings(folder, output, mesh=mesh, **further), on_step)
    return [done["stopped_by"], done["steps"]]


def generate(folder: pathlib.Path, name: str, *flags: str) -> str:
    """What `python -m jaxmoe.generate` prints on this process; it captures into FOLDER/NAME."""
    from jaxmoe.generate.__main__ import main as command

    given = ["--model", str(folder / "model"), "--prompt", "one", "--prompt", "two and", "--prompt", "3"]
    given += ["--max-new-tokens", "12", "--temperature", "1", "--seed", "5", "--capture", str(folder / name)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command([*given, *flags])
    return printed.getvalue()


def generate_from_file(folder: pathlib.Path) -> None:
    """`python -m jaxmoe.generate --prompts`."""
    from jaxmoe.generate.__main__ import main as command

    command(["--model", str(folder / "model"), "--prompts", str(folder / "text.txt"), "--out", str(folder / "none")])


def routing(folder: pathlib.Path, what: str, name: str, *flags: str) -> str:
    """What `python -m jaxmoe.routing capture`, `effects` or `prune` prints on this process; it writes FOLDER/NAME."""
    from jaxmoe.routing.__main__ import main as command

    given = [what, "--model", str(folder / "model"), "--data", str(folder / "text.txt"), "--batch-size", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        command([*given, "--seq-length", "32", "--out", str(folder / name), *flags])
    return printed.getvalue()


EFFECTS = "--layers", "0", "--experts", "0,5"
# How many processes -> the meshes and the cases of `tests.mesh.trial` of which they write all numbers.
TRIALS = {
    2: (("data=2", "adapters"), ("fsdp=2", "all parameters"), ("expert=2", "adapters"), ("context=2", "adapters")),
    4: (("data=2,fsdp=2", "all parameters"), ("context=2,expert=2", "adapters")),
}


def write_numbers(folder: pathlib.Path) -> None:
    """Every gradient, what was trained and what the router chose, on each mesh: FOLDER/MESH.npz."""
    from tests.mesh import trial

    this = launch.this()
    for mesh, name in TRIALS[this.count]:
        found = trial.train(trial.CASES[name], mesh)
        if this.is_first:
            arrays: Any = {"counts": found.counts, **found.named()}
            np.savez(folder / f"{mesh}.npz", **arrays)


def check_differing(folder: pathlib.Path, mesh: str) -> dict[str, Any]:
    """What is found where facts and settings differ between processes."""
    index = launch.this().index
    return {
        "exchanged": exchange_values({"from": index}),
        "differing facts": refused(lambda: check_agreement({"colour": "red", "size": index})),
        "differing settings": refused(lambda: run(folder, "other", mesh, learning_rate=1e-3 * (1 + index))),
    }


def two(folder: pathlib.Path) -> dict[str, Any]:
    """Data, then experts shared by two, with a stop in between; all parameters; a fault; what differs."""
    found = {
        "stopped": run(folder, "several", "data=2", signalled(1, signal.SIGTERM)),
        "done": run(folder, "several", "expert=2"),
        "all parameters": run(folder, "all parameters", "fsdp=2", **ALL_PARAMETERS),
    }
    with read_twice():
        run(folder, "read twice", "data=2")
    write_numbers(folder)
    return found | check_differing(folder, "data=2")


def four(folder: pathlib.Path) -> dict[str, Any]:
    """Combinations of axes over four processes, one run of which stops; a checkpoint with arrays of any form."""
    found = {
        "stopped": run(folder, "fewer and fewer", "data=2,fsdp=2", signalled(2, signal.SIGTERM)),
        "experts": run(folder, "experts", "fsdp=2,expert=2"),
        "context": run(folder, "context", "context=2,expert=2"),
        "NF4": run(folder, "NF4", "fsdp=2,expert=2", **NF4),
        "generated": generate(folder, "generated by four", "--mesh", "data=2,expert=2"),
        "captured": routing(folder, "capture", "captured by four", "--mesh", "fsdp=2,expert=2"),
    }
    save_shared(folder / "shared")
    write_numbers(folder)
    return found | check_differing(folder, "data=4")


def two_after_four(folder: pathlib.Path) -> dict[str, Any]:
    """Two processes continue what four began, and what one process began; they read damaged checkpoints."""
    return {
        "stopped": run(folder, "fewer and fewer", "fsdp=2", signalled(1, signal.SIGTERM)),
        "after one": run(folder, "after one", "expert=2"),
        "generated": generate(folder, "generated by two", "--mesh", "fsdp=2", "--quantize", "nf4"),
        "captured": routing(folder, "capture", "captured by two", "--mesh", "context=2"),
        "effects": routing(folder, "effects", "effects of two.csv", "--mesh", "expert=2", *EFFECTS),
        "pruned": routing(folder, "prune", "pruned by two", "--mesh", "expert=2", "--keep", "5"),
        "from a file": refused(lambda: generate_from_file(folder)),
        "damaged": refused(lambda: read_shared(folder / "damaged")),
        "damaged, of one": refused(lambda: read_shared(folder / "damaged, of one")),
    }


def shared_state() -> Any:
    """The state of the bit flips, its arrays on all devices: split, whole everywhere, or on the host."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxmoe.distributed.mesh import MeshShape
    from jaxmoe.distributed.placement import devices_of
    from reliability.bit_flips import state

    mesh = devices_of(MeshShape(fsdp=launch.this().count))

    def placed(name: str, array: np.ndarray) -> Any:
        if name in ("step", "small"):
            return array
        spec = PartitionSpec() if name == "a0" else PartitionSpec("fsdp")
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])

    arrays = state() | {"step": np.asarray(20)}
    return {name: placed(name, array) for name, array in arrays.items()}


def save_shared(folder: pathlib.Path) -> None:
    """Writes a checkpoint that all processes write together."""
    from jaxmoe.store.train_state import TrainCheckpoints
    from reliability.bit_flips import METADATA

    with contextlib.closing(TrainCheckpoints(folder)) as checkpoints:
        checkpoints.save(20, shared_state(), METADATA)


def read_shared(folder: pathlib.Path) -> None:
    """Restores a checkpoint; each process its share."""
    from jaxmoe.store.train_state import TrainCheckpoints

    with contextlib.closing(TrainCheckpoints(folder)) as checkpoints:
        checkpoints.restore_latest(shared_state())


def kill_while_saving(whose: int, at: int) -> None:
    """The process `whose` dies while the checkpoint of step `at` is written."""
    from jaxmoe.store.train_state import TrainCheckpoints

    save = TrainCheckpoints.save

    def killed(self: Any, step: int, *arguments: Any, **options: Any) -> None:
        if launch.this().index == whose and step == at:
            threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
        save(self, step, *arguments, **options)

    TrainCheckpoints.save = killed  # pyright: ignore[reportAttributeAccessIssue]


# What a scenario does first, and the mesh, the process and the moment of the death at its end.
SCENARIOS: dict[str, tuple[Callable[[pathlib.Path], dict[str, Any]], str, int, str]] = {
    "two": (two, "data=2", 1, "between steps"),
    "four": (four, "data=2,fsdp=2", 2, "while it saves"),
    "two after four": (two_after_four, "fsdp=2", 0, "between steps"),
}


def main(scenario: str, folder: pathlib.Path) -> None:
    """All that a process does."""
    act, mesh, victim, moment = SCENARIOS[scenario]
    found = act(folder)
    (folder / f"{scenario}-{launch.this().index}.json").write_text(json.dumps(found))
    if moment == "while it saves":
        kill_while_saving(victim, at=3)
        run(folder, f"killed, {scenario}", mesh)
    else:
        run(folder, f"killed, {scenario}", mesh, signalled(victim, signal.SIGKILL, after=3))


if __name__ == "__main__":
    what, where, me, of, port = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    flags = argparse.Namespace(coordinator=f"127.0.0.1:{port}", num_processes=of, process_id=me, heartbeat=HEARTBEAT)
    if not launch.start(flags).is_first:
        progress.hide()
    with ending.together():
        main(what, where)
