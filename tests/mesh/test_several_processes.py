"""Several processes of one run, over gloo on the CPU: they agree, compute what one computes, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from captures import Capture
from jaxmoe.errors import UserError
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train.loop import train
from peers.make_checkpoint import make_checkpoint
from reliability import bit_flips
from tests.conftest import ROOT
from tests.mesh import process, trial
from tests.mesh.test_inference import check_equal
from tests.tolerances import bound

pytestmark = pytest.mark.wide

FLIPS = 40


class Ended(NamedTuple):
    """How the processes of a scenario ended: exit codes, what they printed, seconds from the first death to the last
    end."""

    folder: pathlib.Path
    scenario: str
    codes: list[int]
    errors: list[str]
    printed: list[str]
    seconds: float

    def found(self) -> list[dict[str, Any]]:
        """What each process found."""
        files = (self.folder / f"{self.scenario}-{index}.json" for index in range(len(self.codes)))
        return [json.loads(file.read_text()) for file in files]


def make_inputs(folder: pathlib.Path) -> None:
    """A model and records to train on."""
    make_checkpoint(folder / "model", trial.PLAIN)
    lines = (json.dumps({"prompt": f"{i} + {i % 7} = ", "completion": str(i + i % 7) * (1 + i % 3)}) for i in range(60))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")


def write_text(folder: pathlib.Path) -> None:
    """A text to capture."""
    (folder / "text.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(12)))


def run_processes(scenario: str, folder: pathlib.Path, count: int) -> Ended:
    """Runs a scenario of `tests.mesh.process` in so many processes, with one device each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(flag for flag in flags if "device_count" not in flag)
    command = [sys.executable, "-m", "tests.mesh.process", scenario, str(folder)]
    started = [
        subprocess.Popen(
            [*command, str(index), str(count), str(port)],
            cwd=ROOT,
            env=environment | {"JAX_PLATFORMS": "cpu"},
            stdout=(folder / f"{scenario}-{index}.out").open("w"),
            stderr=(folder / f"{scenario}-{index}.err").open("w"),
        )
        for index in range(count)
    ]
    victim = process.SCENARIOS[scenario][2]
    try:
        started[victim].wait(timeout=1800)
        died = time.monotonic()
        for each in started:
            each.wait(timeout=60)
    finally:
        for each in started:
            each.kill()
    seconds = time.monotonic() - died
    errors, printed = (
        [(folder / f"{scenario}-{index}.{stream}").read_text() for index in range(count)] for stream in ("err", "out")
    )
    return Ended(folder, scenario, [each.returncode for each in started], errors, printed, seconds)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    base = tmp_path_factory.mktemp("processes")
    make_inputs(base)
    write_text(base)
    return base


@pytest.fixture(scope="module")
def one(folder: pathlib.Path) -> pathlib.Path:
    """The run of one process on the same data."""
    train(process.settings(folder, "one"))
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: pathlib.Path) -> Ended:
    return run_processes("two", folder, 2)


@pytest.fixture(scope="module")
def four(folder: pathlib.Path) -> Ended:
    return run_processes("four", folder, 4)


@pytest.fixture(scope="module")
def two_after_four(four: Ended, one: pathlib.Path) -> Ended:
    """Two processes, with the runs and checkpoints of four, and with those of one, which are in an earlier form."""
    folder = four.folder
    shutil.copytree(one, folder / "after one")
    for step in TrainCheckpoints(one / "checkpoints").steps()[1:]:
        shutil.rmtree(folder / "after one" / "checkpoints" / str(step))
    shutil.copytree(folder / "shared", folder / "damaged")
    bit_flips.prepare(folder / "of one")
    shutil.copytree(folder / "of one" / "checkpoints", folder / "damaged, of one")
    for damaged in ("damaged", "damaged, of one"):
        arrays = max((folder / damaged / "20" / "state").rglob("*"), key=lambda file: file.stat().st_size)
        flip_middle(arrays)
    return run_processes("two after four", folder, 2)


def flip_middle(file: pathlib.Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


def numbers(run: pathlib.Path) -> np.ndarray:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, process.STEPS + 1))
    return np.asarray([row[name] for row in rows for name in ("loss", "aux_loss", "grad_norm")])


def same_results(found: pathlib.Path, expected: pathlib.Path, trained: str = "adapter_model.safetensors") -> None:
    """Raises AssertionError unless losses and what was trained, the file `trained`, are the same in two runs."""
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=bound("mesh_fp32"))
    ours, theirs = (load_file(run / trained) for run in (found, expected))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        error = np.linalg.norm(ours[name] - theirs[name]) / max(np.linalg.norm(theirs[name]), 1e-30)
        assert error <= bound("mesh_fp32"), name


def test_two_compute_what_one_computes(two: Ended, one: pathlib.Path) -> None:
    """The data, then the experts are shared by two processes, with a stop and another mesh in between."""
    same_results(two.folder / "several", one)
    ours, theirs = (json.loads((run / "train_config.json").read_text()) for run in (two.folder / "several", one))
    assert ours["identity"] == theirs["identity"]


def test_two_train_all_parameters_as_one_does(two: Ended) -> None:
    """The weights and the optimizer's state are shared by two processes; the model is written once, whole."""
    train(process.settings(two.folder, "all in one", **process.ALL_PARAMETERS))
    same_results(two.folder / "all parameters", two.folder / "all in one", "model/model.safetensors")


@pytest.mark.parametrize("run", ["experts", "context"])
def test_four_compute_what_one_computes(run: str, four: Ended, one: pathlib.Path) -> None:
    same_results(four.folder / run, one)


def test_four_compute_what_one_computes_in_nf4(four: Ended) -> None:
    train(process.settings(four.folder, "NF4 in one", **process.NF4))
    same_results(four.folder / "NF4", four.folder / "NF4 in one")


@pytest.mark.parametrize(
    ("count", "mesh", "name"), [(count, *each) for count, trials in process.TRIALS.items() for each in trials]
)
def test_every_gradient_is_that_of_one_device(count: int, mesh: str, name: str, request: pytest.FixtureRequest) -> None:
    """And so are the losses, the routing and what was trained, over five steps."""
    ended: Ended = request.getfixturevalue({2: "two", 4: "four"}[count])
    found, expected = dict(np.load(ended.folder / f"{mesh}.npz")), trial.on_one_device(name)
    np.testing.assert_array_equal(found.pop("counts"), expected.counts)
    assert sum(name.startswith("gradients") for name in found) == len(expected.gradients) > 8
    error, where = trial.worst_error(found, expected.named())
    assert error <= bound("mesh_fp32"), where


def test_two_and_then_one_continue_what_four_began(two_after_four: Ended, one: pathlib.Path) -> None:
    folder = two_after_four.folder
    before, after = (json.loads((folder / f"{name}-0.json").read_text()) for name in ("four", "two after four"))
    assert 1 < before["stopped"][1] < after["stopped"][1] < process.STEPS
    train(process.settings(folder, "fewer and fewer"))
    same_results(folder / "fewer and fewer", one)


def test_several_continue_what_one_began(two_after_four: Ended, one: pathlib.Path) -> None:
    """Its checkpoint has the SHA-256 of whole arrays, of which each process has a share."""
    assert [found["after one"] for found in two_after_four.found()] == [[None, process.STEPS]] * 2
    same_results(two_after_four.folder / "after one", one)


def test_a_batch_that_is_read_twice_is_noticed(two: Ended, one: pathlib.Path) -> None:
    with pytest.raises(AssertionError):
        same_results(two.folder / "read twice", one)


@pytest.mark.parametrize("scenario", ["two", "four"])
def test_a_signal_to_one_stops_all_after_the_same_step(scenario: str, request: pytest.FixtureRequest) -> None:
    ended: Ended = request.getfixturevalue(scenario)
    first, *others = (found["stopped"] for found in ended.found())
    assert all(each == first for each in others)
    assert first[0] == signal.SIGTERM and 1 < first[1] < process.STEPS
    if scenario == "two":
        assert [found["done"] for found in ended.found()] == [[None, process.STEPS]] * 2


@pytest.mark.parametrize("scenario", ["two", "four", "two_after_four"])
def test_a_killed_process_ends_the_others_and_the_run_continues_in_one(
    scenario: str, one: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    """The last one of two, one of four in the middle of a save, the first one of two."""
    ended: Ended = request.getfixturevalue(scenario)
    victim = process.SCENARIOS[ended.scenario][2]
    survivors = [index for index in range(len(ended.codes)) if index != victim]
    assert ended.codes[victim] == -signal.SIGKILL
    assert [ended.codes[index] for index in survivors] == [3] * len(survivors)
    assert ended.seconds < process.HEARTBEAT + 10
    for index in survivors:
        line = ended.errors[index].strip().splitlines()[-1]
        assert line.startswith(f"process {victim} on ") and "died" in line and "--resume" in line
    killed = f"killed, {ended.scenario}"
    assert not (ended.folder / killed / "adapter_model.safetensors").exists()
    train(process.settings(ended.folder, killed))
    same_results(ended.folder / killed, one)


@pytest.mark.parametrize("scenario", ["two", "four"])
def test_what_differs_is_named_on_all(scenario: str, request: pytest.FixtureRequest) -> None:
    ended: Ended = request.getfixturevalue(scenario)
    for found in ended.found():
        assert found["exchanged"] == [{"from": index} for index in range(len(ended.codes))]
        differing = {"differing facts": "size: expected 0, found 1", "differing settings": "--learning-rate: expected"}
        for what, words in differing.items():
            assert found[what].startswith("process 1 on ") and words in found[what]
    assert not (ended.folder / "other").exists()


LEAVES_LATE = """
import argparse, sys, time
import jax
from jaxmoe.distributed import ending, launch
flags = argparse.Namespace(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), heartbeat=30)
first, leave = launch.start(flags).is_first, jax.distributed.shutdown
jax.distributed.shutdown = lambda: (time.sleep(0 if first else 6), leave())
with ending.together():
    pass
"""


def test_a_process_that_leaves_late_ends_well() -> None:
    """The coordinator lives in the first one, which therefore leaves last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", LEAVES_LATE, address]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    started = [subprocess.Popen([*command, str(index)], cwd=ROOT, env=environment) for index in range(2)]
    assert [each.wait(timeout=120) for each in started] == [0, 0]


def test_only_the_first_process_reports(two: Ended) -> None:
    assert f"step 1/{process.STEPS}  loss" in two.printed[0]
    assert "loss" not in two.printed[1]


def test_several_generate_what_one_generates(four: Ended, two_after_four: Ended) -> None:
    """Drawn text, its routing in a capture that is written once; only the first process prints."""
    for ended, name, flags in ((four, "four", ()), (two_after_four, "two", ("--quantize", "nf4"))):
        expected = process.generate(ended.folder, f"generated by one beside {name}", *flags)
        printed, *others = (found["generated"] for found in ended.found())
        assert printed == expected and len(printed) > 20 and not any(others)
        captures = (Capture.open(ended.folder / f"generated by {who}") for who in (name, f"one beside {name}"))
        check_equal(*captures)
    assert "several processes generate for --prompt only, found --prompts" in two_after_four.found()[1]["from a file"]


def test_several_capture_what_one_captures(four: Ended, two_after_four: Ended) -> None:
    folder = four.folder
    process.routing(folder, "capture", "captured by one")
    for ended, name in ((four, "four"), (two_after_four, "two")):
        check_equal(Capture.open(folder / f"captured by {name}"), Capture.open(folder / "captured by one"))
        assert [bool(found["captured"]) for found in ended.found()] == [True] + [False] * (len(ended.codes) - 1)


def test_two_measure_the_effects_that_one_measures(two_after_four: Ended) -> None:
    folder = two_after_four.folder
    process.routing(folder, "effects", "effects of one.csv", *process.EFFECTS)
    several, one = (
        np.genfromtxt(folder / f"effects of {who}.csv", delimiter=",", names=True) for who in ("two", "one")
    )
    assert several.dtype == one.dtype and len(one) == 2
    for name in ("layer", "expert", "load", "same_prediction"):
        np.testing.assert_array_equal(several[name], one[name])
    np.testing.assert_allclose(several["loss"], one["loss"], rtol=bound("mesh_fp32"))


def test_two_prune_as_one_does(two_after_four: Ended) -> None:
    folder = two_after_four.folder
    process.routing(folder, "prune", "pruned by one", "--keep", "5")
    assert [bool(found["pruned"]) for found in two_after_four.found()] == [True, False]
    for file in ("model.safetensors", "pruning.json"):
        assert (folder / "pruned by two" / file).read_bytes() == (folder / "pruned by one" / file).read_bytes()


def test_processes_notice_damage_in_what_each_reads(two_after_four: Ended) -> None:
    """In a checkpoint of four processes, and in one of a single process: on all processes, which end together."""
    for found in two_after_four.found():
        for damaged in ("damaged", "damaged, of one"):
            assert str(two_after_four.folder / damaged / "20") in found[damaged]


def test_no_damage_to_a_checkpoint_of_several_gives_other_numbers(four: Ended, tmp_path: pathlib.Path) -> None:
    """Read by a single process: any flipped bit is refused, or makes no difference."""
    expected = bit_flips.state() | {"step": np.asarray(20)}
    refused = 0
    for index in range(FLIPS):
        rng, folder = random.Random(index), tmp_path / str(index)
        shutil.copytree(four.folder / "shared", folder)
        file = rng.choice(sorted(each for each in (folder / "20").rglob("*") if each.is_file() and each.stat().st_size))
        kind = bit_flips.flip(file, rng)
        restored, message = None, ""
        try:
            with contextlib.closing(TrainCheckpoints(folder)) as checkpoints:
                restored = checkpoints.restore_latest(expected)
        except UserError as error:
            message = str(error)
        if restored is None:
            assert str(folder / "20") in message, (file, kind)
            refused += 1
            continue
        assert restored[::2] == (20, bit_flips.METADATA), (file, kind)
        for name, array in expected.items():
            assert np.asarray(restored[1][name]).tobytes() == array.tobytes(), (file, kind, name)
    assert refused > 0
