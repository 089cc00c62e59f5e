"""The reported tokens per second, against a simulated device that works on steps after they were started."""

from __future__ import annotations

import math
import pathlib
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train import loop, speed
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.speed import Arrivals, Arrived, Speed
from jaxmoe.train.step import EvalSums, StepMetrics
from peers.make_checkpoint import TINY, make_checkpoint
from tests.test_train import write_records
from tests.tolerances import bound

STEPS = 25
STEP_SECONDS = 0.4
HOST_SECONDS = 0.004  # between two steps, to make a batch
TOKENS = 8192


class Clock(threading.local):
    """The time of each thread: that of the loop, and that of the thread that waits for the device."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait_until(self, when: float) -> None:
        self.now = max(self.now, when)


class Late:
    """An array that is ready at a certain time: fetching it earlier waits."""

    def __init__(self, value: Any, ready: float, clock: Clock) -> None:
        self._value, self._ready, self._clock = np.asarray(value), ready, clock

    def __array__(self, *args: Any, **options: Any) -> np.ndarray:
        self._clock.wait_until(self._ready)
        return self._value


class Device:
    """A device that works on one step after the other.

    Starting a step returns when at most `ahead` seconds of work are left: inf for a device that queues everything, 0
    for one that the host waits for.
    """

    def __init__(self, ahead: float, clock: Clock) -> None:
        self._ahead, self._clock, self._free = ahead, clock, 0.0
        self.ready: list[float] = []  # by step

    def work(self, seconds: float) -> float:
        self._free = max(self._clock(), self._free) + seconds
        self._clock.wait_until(self._free - self._ahead)
        return self._free

    def train_step(self, frozen: Any, state: Any, batch: Any) -> tuple[Any, StepMetrics]:
        if not self.ready:
            self._clock.now += 100 * STEP_SECONDS  # the compiler
        self._clock.now += HOST_SECONDS
        self.ready.append(self.work(STEP_SECONDS))
        late: Any = lambda value: Late(value, self.ready[-1], self._clock)
        counts = np.ones((TINY.num_hidden_layers, TINY.num_experts), np.int32)
        numbers: Any = StepMetrics(late(1.0), late(1.0), late(1.0), late(1e-4), late(TOKENS), late(counts), {})
        return state, numbers

    def eval_step(self, frozen: Any, trainable: Any, batch: Any) -> tuple[Any, Any]:
        late: Any = Late(1.0, self.work(5 * STEP_SECONDS), self._clock)
        return EvalSums(late, {}), late


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder / "model", TINY)
    write_records(folder / "data.jsonl", range(12))
    return folder


def reported(
    base: pathlib.Path, output: pathlib.Path, ahead: float, log_every: int, monkeypatch: pytest.MonkeyPatch
) -> list[float | None]:
    """The reported speed of each step, in a run with evaluations and saves on the simulated device."""
    clock = Clock()
    device = Device(ahead, clock)

    class Steps(loop.CompiledSteps):
        def __init__(self, *args: Any) -> None:
            pass

        train_step: Any = property(lambda self: device.train_step)
        eval_step: Any = property(lambda self: device.eval_step)

    save = TrainCheckpoints.save

    def slow_save(self: TrainCheckpoints, step: int, *rest: Any, **options: Any) -> None:
        clock.now += 3 * STEP_SECONDS
        if step == STEPS:
            save(self, step, *rest, **options)

    monkeypatch.setattr(TrainCheckpoints, "save", slow_save)
    monkeypatch.setattr(loop, "CompiledSteps", Steps)
    for module in (loop, speed):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    speeds: list[float | None] = []

    def on_step(numbers: dict[str, Any]) -> None:
        clock.wait_until(device.ready[numbers["step"] - 1])  # the loop has waited for these numbers
        speeds.append(numbers["tokens_per_second"])

    settings = TrainConfig(
        model=base / "model",
        data=base / "data.jsonl",
        output=output,
        max_steps=STEPS,
        seq_length=48,
        eval_fraction=0.2,
        eval_every=7,
        save_every=11,
        log_every=log_every,
        tensorboard=False,
    )
    loop.train(settings, on_step)
    return speeds


def check(speeds: list[float | None]) -> None:
    first, *rest = speeds
    assert first is None, "the first step waits for the compiler"
    assert len(rest) == STEPS - 1
    right = TOKENS / STEP_SECONDS
    wrong = [
        (step, found)
        for step, found in enumerate(rest, start=2)
        if found != pytest.approx(right, rel=bound("reported_speed"))
    ]
    assert wrong == [], f"expected {right} at each step"


AHEAD = {"queues all": math.inf, "queues half a step": STEP_SECONDS / 2, "queues nothing": 0.0}


@pytest.mark.parametrize("log_every", [1, 10])
@pytest.mark.parametrize("ahead", AHEAD.values(), ids=AHEAD)
def test_every_reported_speed_is_the_devices(
    ahead: float, log_every: int, base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(reported(base, tmp_path / "out", ahead, log_every, monkeypatch))


def test_the_time_at_which_the_loop_looks_is_another(
    base: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the loop itself measured the time, the last step and those before an evaluation would be twice as fast."""

    class Looked(Future[Arrived]):
        def __init__(self, numbers: Any) -> None:
            super().__init__()
            self._numbers = numbers

        def result(self, timeout: float | None = None) -> Arrived:
            numbers = speed.jax.device_get(self._numbers)
            return Arrived(numbers, speed.time.perf_counter())

    monkeypatch.setattr(Arrivals, "expect", lambda self, numbers: Looked(numbers))
    speeds = reported(base, tmp_path / "out", STEP_SECONDS / 2, 1, monkeypatch)
    assert speeds[-1] == pytest.approx(2 * TOKENS / STEP_SECONDS, rel=bound("doubled_speed"))
    with pytest.raises(AssertionError, match="at each step"):
        check(speeds)


def test_speed_counts_from_the_last_mark() -> None:
    measured = Speed()
    assert measured.completed(100.0, 999) is None
    assert measured.completed(102.0, 10) == 5.0
    assert measured.completed(104.0, 30) == 10.0
    measured.restart(104.0)
    assert measured.completed(105.0, 10) == 10.0
    measured.restart(200.0)
    assert measured.completed(201.0, 7) == 7.0


def test_numbers_arrive_with_their_time() -> None:
    arrivals = Arrivals()
    first, second = arrivals.expect({"a": np.float32(1.5)}), arrivals.expect({"a": np.float32(2.5)})
    assert first.result().numbers["a"] == 1.5
    assert first.result().when <= second.result().when
    arrivals.close()
