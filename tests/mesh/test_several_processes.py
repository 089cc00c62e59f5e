"""Several processes of one run, over gloo on the CPU: they agree, compute what one computes, and end together."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmoe.train.loop import train
from peers.make_checkpoint import make_checkpoint
from tests.conftest import ROOT
from tests.mesh import process, trial
from tests.tolerances import bound

pytestmark = pytest.mark.wide


class Ended(NamedTuple):
    """How the processes ended: exit codes, what they printed on standard error, seconds after the first one died."""

    folder: pathlib.Path
    codes: list[int]
    errors: list[str]
    printed: list[str]
    seconds: float

    def found(self, index: int) -> dict[str, object]:
        return json.loads((self.folder / f"found-{index}.json").read_text())


def make_inputs(folder: pathlib.Path) -> None:
    """A model and records to train on."""
    make_checkpoint(folder / "model", trial.PLAIN)
    lines = (json.dumps({"prompt": f"{i} + {i % 7} = ", "completion": str(i + i % 7) * (1 + i % 3)}) for i in range(60))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


def run_processes(folder: pathlib.Path, count: int) -> Ended:
    """Runs `tests.mesh.process` in so many processes, with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.mesh.process", str(folder)]
    started = [
        subprocess.Popen(
            [*command, str(index), str(count), str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    try:
        started[-1].wait(timeout=300)
        died = time.monotonic()
        outputs = [each.communicate(timeout=60) for each in started]
    finally:
        for each in started:
            each.kill()
    seconds = time.monotonic() - died
    printed, errors = ([each[stream] for each in outputs] for stream in (0, 1))
    return Ended(folder, [each.returncode for each in started], errors, printed, seconds)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    folder = tmp_path_factory.mktemp("two")
    make_inputs(folder)
    return run_processes(folder, 2)


@pytest.fixture(scope="module")
def one(two: Ended) -> pathlib.Path:
    """The run of one process on the same data."""
    train(process.settings(two.folder, "one"))
    return two.folder / "one"


def numbers(run: pathlib.Path) -> np.ndarray:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, process.STEPS + 1))
    return np.asarray([row[name] for row in rows for name in ("loss", "aux_loss", "grad_norm")])


def same_results(found: pathlib.Path, expected: pathlib.Path) -> None:
    """Raises AssertionError unless losses and adapters of two runs are the same."""
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=bound("mesh_fp32"))
    ours, theirs = (load_file(run / "adapter_model.safetensors") for run in (found, expected))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        error = np.linalg.norm(ours[name] - theirs[name]) / max(np.linalg.norm(theirs[name]), 1e-30)
        assert error <= bound("mesh_fp32"), name


def test_processes_compute_what_one_computes(two: Ended, one: pathlib.Path) -> None:
    """The data, then the experts are shared by two processes, with a stop and another mesh in between."""
    same_results(two.folder / "several", one)
    ours, theirs = (json.loads((run / "train_config.json").read_text()) for run in (two.folder / "several", one))
    assert ours["identity"] == theirs["identity"]


def test_a_batch_that_is_read_twice_is_noticed(two: Ended, one: pathlib.Path) -> None:
    with pytest.raises(AssertionError):
        same_results(two.folder / "read twice", one)


def test_a_signal_to_one_stops_all_after_the_same_step(two: Ended) -> None:
    first, second = (two.found(index)["stopped"] for index in (0, 1))
    assert first == second
    assert first[0] == signal.SIGTERM and 1 < first[1] < process.STEPS  # pyright: ignore[reportIndexIssue]
    assert two.found(0)["done"] == two.found(1)["done"] == [None, process.STEPS]


def test_a_killed_process_ends_the_others_and_the_run_continues_in_one(two: Ended, one: pathlib.Path) -> None:
    assert two.codes == [3, -signal.SIGKILL]
    assert two.seconds < process.HEARTBEAT + 10
    line = two.errors[0].strip().splitlines()[-1]
    assert line.startswith("process 1 on ") and "died" in line and "--resume" in line
    assert not (two.folder / "killed" / "adapter_model.safetensors").exists()
    train(process.settings(two.folder, "killed"))
    same_results(two.folder / "killed", one)


def test_what_differs_is_named_on_all(two: Ended) -> None:
    for index in (0, 1):
        found = two.found(index)
        assert found["exchanged"] == [{"from": 0}, {"from": 1}]
        differing = {"differing facts": "size: expected 0, found 1", "differing settings": "--learning-rate: expected"}
        for what, words in differing.items():
            message = str(found[what])
            assert message.startswith("process 1 on ") and words in message
    assert not (two.folder / "other").exists()


def test_only_the_first_process_reports(two: Ended) -> None:
    assert "step 1/6  loss" in two.printed[0]
    assert "loss" not in two.printed[1]
