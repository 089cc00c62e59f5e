"""Trackers: what each library receives, that a resumed run continues the same remote run, and what happens when one is
missing or fails. Trackio is a stand-in with the signatures of its first and its present API."""

from __future__ import annotations

import json
import logging
import pathlib
import sys
import types
import typing
from typing import Any

import pytest

from jaxmoe.errors import UserError
from jaxmoe.train import trackers
from jaxmoe.train.metrics import MetricsLog, scalars
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.trackers import Reported, Trackers, check_trackers

NUMBERS = {"step": 1, "loss": 1.5, "eval_loss": None, "expert_load_cv": [0.5, 0.25]}
SETTINGS = {"learning_rate": 0.01, "adapter": None, "lora_targets": ["attention"]}


def report(name: str, output: pathlib.Path, steps: typing.Iterable[int], keep_to: int = -1) -> dict[str, Any]:
    """Reports `steps` as a run does; returns what the tracker stored."""
    output.mkdir(exist_ok=True)
    log = MetricsLog(output, keep_to=keep_to)
    log.also(Trackers([name], Reported(output, SETTINGS, keep_to)))
    for step in steps:
        log.write(NUMBERS | {"step": step})
    log.close("done")
    return json.loads((output / trackers.TRACKERS_FILE).read_text())[name]


def settings(**changes: Any) -> TrainConfig:
    paths = {name: pathlib.Path(name) for name in ("model", "data", "output")}
    return TrainConfig(**paths, **changes)


def test_the_same_numbers_go_everywhere() -> None:
    assert scalars(NUMBERS) == {"loss": 1.5, "expert_load_cv/layer_00": 0.5, "expert_load_cv/layer_01": 0.25}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ("tensorboard",)),
        ({"tensorboard": False}, ()),
        ({"report_to": ("none",)}, ()),
        ({"report_to": ("none",), "tensorboard": True}, ("tensorboard",)),
        ({"report_to": ("wandb", "mlflow", "wandb")}, ("wandb", "mlflow")),
        ({"report_to": ("wandb",), "tensorboard": True}, ("wandb", "tensorboard")),
        ({"report_to": ("tensorboard", "wandb"), "tensorboard": False}, ("wandb",)),
    ],
)
def test_which_trackers_the_flags_choose(changes: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert settings(**changes).trackers == expected


def test_every_choice_is_a_tracker() -> None:
    (choices, _) = typing.get_args(typing.get_type_hints(TrainConfig)["report_to"])
    assert {*typing.get_args(choices)} == {"none", *trackers.KINDS} == {"none", *typing.get_args(trackers.TrackerName)}
    with pytest.raises(UserError, match="report_to: expected none alone, found wandb,none"):
        settings(report_to=("wandb", "none"))


def test_wandb_offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra jaxmoe[wandb] is not installed")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    check_trackers(["wandb"], pathlib.Path("run"))
    first = report("wandb", tmp_path / "run", [1, 2, 3])
    again = report("wandb", tmp_path / "run", [3, 4], keep_to=2)
    other = report("wandb", tmp_path / "other", [1])
    assert again == first
    assert other["id"] != first["id"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{first['id']}.wandb"))
    assert files, "both parts of the run are files of one id, which `wandb sync` puts together"
    assert all(b"expert_load_cv/layer_01" in file.read_bytes() for file in files)


@pytest.mark.parametrize("folder", ["run", "run/logs", "run/../run"])
def test_the_links_of_wandb_stay_out_of_the_output_folder(
    folder: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / folder))
    with pytest.raises(UserError, match=r"expected a folder for its files outside .*run, .*; set WANDB_DIR"):
        check_trackers(["wandb"], tmp_path / "run")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    check_trackers(["wandb"], tmp_path / "run")
    monkeypatch.delenv("WANDB_DIR")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set WANDB_DIR"):
        check_trackers(["wandb"], pathlib.Path())


def test_wandb_that_dies_says_nothing_more(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its process is gone: the library must not try to reach it when the interpreter ends."""

    class Dead(types.ModuleType):
        torn_down = 0

        def init(self, **_: Any) -> Any:
            def log(numbers: Any) -> None:
                raise ConnectionResetError("Connection lost")

            return types.SimpleNamespace(define_metric=lambda *_, **__: None, log=log)

        def teardown(self, exit_code: int) -> None:
            self.torn_down += 1
            raise ConnectionResetError("Connection lost")

    wandb = Dead("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    together = Trackers(["wandb"], Reported(tmp_path))
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        together.write(1, {"loss": 1.0})
        together.write(2, {"loss": 1.0})
        together.close("done")
    assert [record.getMessage() for record in caplog.records] == [
        "report_to: wandb failed and is left out from here on: Connection lost"
    ]
    assert wandb.torn_down == 1


def test_wandb_without_a_key(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra jaxmoe[wandb] is not installed")
    for name, value in {"HOME": tmp_path, "NETRC": tmp_path / "netrc", "WANDB_CONFIG_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"expected an API key .* or WANDB_MODE=offline, found neither"):
        check_trackers(["wandb"], pathlib.Path("run"))


@pytest.mark.parametrize("store", ["file://{}/store", "sqlite:///{}/store.db"])
def test_mlflow(store: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra jaxmoe[mlflow] is not installed")
    if store.startswith("sqlite"):
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny reads no database without it")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    first = report("mlflow", tmp_path / "run", [1, 2])
    client = mlflow.MlflowClient()
    assert report("mlflow", tmp_path / "run", [3], keep_to=2) == first
    history = client.get_metric_history(first["run_id"], "expert_load_cv/layer_01")
    assert [(each.step, each.value) for each in history] == [(1, 0.25), (2, 0.25), (3, 0.25)]
    run = client.get_run(first["run_id"])
    assert run.data.params == {"learning_rate": "0.01", "lora_targets": "['attention']"}
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    # A run that the store does not know cannot be continued.
    (tmp_path / "run" / trackers.TRACKERS_FILE).write_text('{"mlflow": {"run_id": "0" }}')
    with pytest.raises(UserError, match="report_to: mlflow: "):
        Trackers(["mlflow"], Reported(tmp_path / "run", keep_to=2))


class StandIn(types.ModuleType):
    """What Trackio's functions are called with. Version 0.0.6 has neither `resume` nor `step`."""

    def __init__(self, *, first_version: bool) -> None:
        super().__init__("trackio")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.finished = 0
        self.broken = False
        if first_version:
            self.init = lambda project, name=None, config=None: self._begin(project, name, config, "always")
            self.log = self._log_without_step
        else:
            self.init = lambda project, name=None, group=None, space_id=None, config=None, resume="never": self._begin(
                project, name, config, resume
            )
            self.log = self._log

    def _begin(self, project: str, name: str | None, config: Any, resume: str) -> None:
        self.runs.append({"project": project, "name": name, "config": config, "resume": resume})

    def _log_without_step(self, metrics: dict[str, float]) -> None:
        self._log(metrics)

    def _log(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.broken:
            raise ConnectionError("the server is gone\nfor good")
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("first_version", [True, False])
def test_trackio(first_version: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = StandIn(first_version=first_version)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    check_trackers(["trackio"], pathlib.Path("run"))
    first = report("trackio", tmp_path / "run", [1])
    assert report("trackio", tmp_path / "run", [2], keep_to=1) == first
    assert [run["name"] for run in trackio.runs] == [first["name"]] * 2
    assert first["name"].startswith("run-")
    assert trackio.runs[0]["config"] == SETTINGS
    assert trackio.runs[0]["resume"] == ("always" if first_version else "allow")
    metrics = {"loss": 1.5, "expert_load_cv/layer_00": 0.5, "expert_load_cv/layer_01": 0.25}
    one, two = (({"step": step, **metrics}, None) if first_version else (metrics, step) for step in (1, 2))
    assert trackio.logged == [one, two]
    assert trackio.finished == 2


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackio = StandIn(first_version=False)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    together = Trackers(["trackio"], Reported(tmp_path))
    trackio.broken = True
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        for step in (1, 2):
            together.write(step, {"loss": 1.0})
        together.close("done")
    assert [record.getMessage() for record in caplog.records] == [
        "report_to: trackio failed and is left out from here on: the server is gone"
    ]
    assert trackio.finished == 0


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_library_that_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"report_to: {name} is not installed: pip install 'jaxmoe\[{name}\]'"):
        check_trackers([name], pathlib.Path("run"))


def test_tensorboard(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, keep_to=-1)
    log.also(Trackers(["tensorboard"], Reported(tmp_path)))
    log.write(NUMBERS)
    log.close()
    (written,) = (tmp_path / "tensorboard").iterdir()
    content = written.read_bytes()
    assert b"loss" in content
    assert b"expert_load_cv/layer_01" in content
    assert b"eval_loss" not in content
    assert not (tmp_path / trackers.TRACKERS_FILE).exists()

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    check_trackers(["tensorboard"], pathlib.Path("run"))
    assert Trackers(["tensorboard"], Reported(tmp_path)).notices == [
        "tensorboardX is not installed: nothing is reported to tensorboard"
    ]
