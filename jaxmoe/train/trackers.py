"""Where a run's numbers go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, Trackio, each through its own
library.

What a tracker needs to continue the same run later is stored in OUTPUT/trackers.json.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxmoe.config import read_json
from jaxmoe.errors import UserError
from jaxmoe.store.files import output_file
from jaxmoe.store.items import first_line

TRACKERS_FILE = "trackers.json"
PROJECT = "jaxmoe"  # where the user's environment names no other project
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Ended = Literal["done", "stopped", "failed"]
_log = logging.getLogger("jaxmoe")


@dataclass(frozen=True)
class Reported:
    """What trackers are told about a run: its folder, its settings as JSON, the last step that it keeps (-1: a new
    run)."""

    output: pathlib.Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    keep_to: int = -1

    @property
    def name(self) -> str:
        """The name of the output folder."""
        return self.output.resolve().name


class Tracker:
    """One place that shows a run's numbers. `stored` is what it needs to continue the same run: empty for a new one."""

    library: ClassVar[str]
    remote: ClassVar[bool] = True  # it may fail at any time, which is no reason to end the run

    def __init__(self, run: Reported, stored: Mapping[str, Any]) -> None:
        self.stored: dict[str, Any] = dict(stored)

    @classmethod
    def check(cls, output: pathlib.Path) -> None:
        """Raises UserError if the tracker cannot work here for a run with this output folder, before it begins."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of one step."""
        raise NotImplementedError

    def close(self, ended: Ended) -> None:
        """Tells how the run ended; called once."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Releases what the library holds after it has failed; called instead of `close`."""


class TensorBoard(Tracker):
    """Event files in OUTPUT/tensorboard, written by tensorboardX."""

    library = "tensorboardX"
    remote = False

    def __init__(self, run: Reported, stored: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        super().__init__(run, stored)
        purge = None if run.keep_to < 0 else run.keep_to + 1
        self._board = SummaryWriter(str(run.output / "tensorboard"), purge_step=purge)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)
        self._board.flush()

    def close(self, ended: Ended) -> None:
        self._board.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases; the variables WANDB_PROJECT, WANDB_NAME, WANDB_MODE, WANDB_DIR and so on count."""

    library = "wandb"

    @classmethod
    def check(cls, output: pathlib.Path) -> None:
        import wandb

        folder = pathlib.Path(os.environ.get("WANDB_DIR") or os.curdir).resolve()
        if folder.is_relative_to(output.resolve()):
            raise UserError(
                f"report_to: wandb: expected a folder for its files outside {output}, since they hold links; found "
                f"{folder}; set WANDB_DIR to another one"
            )
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError(
                "report_to: wandb: expected an API key (`wandb login`, or WANDB_API_KEY) or WANDB_MODE=offline, "
                "found neither"
            )

    def __init__(self, run: Reported, stored: Mapping[str, Any]) -> None:
        import wandb

        super().__init__(run, stored)
        self.stored = {
            "project": os.environ.get("WANDB_PROJECT") or PROJECT,
            "id": os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8],
        } | self.stored
        name = os.environ.get("WANDB_NAME") or run.name
        self._run = wandb.init(**self.stored, name=name, resume="allow", config=dict(run.settings))
        # Its own count of calls must grow all the time, and would refuse steps that a resumed run takes again.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, ended: Ended) -> None:
        self._run.finish(exit_code=int(ended == "failed"))

    def abandon(self) -> None:
        import wandb

        # Otherwise the library tries to reach its process once more when the interpreter ends.
        wandb.teardown(exit_code=1)


class MLflow(Tracker):
    """A run of MLflow; the variables MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on count."""

    library = "mlflow"

    def __init__(self, run: Reported, stored: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        super().__init__(run, stored)
        # A step waits for the server. The library's own limits would hold up a run for minutes if the server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds
        self._client = MlflowClient()
        if "run_id" in self.stored:
            self._client.update_run(self.stored["run_id"], status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        identifier = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        run_id = self._client.create_run(identifier, run_name=run.name).info.run_id
        self.stored = {"run_id": run_id}
        settings = [Param(name, str(value)) for name, value in run.settings.items() if value is not None]
        self._client.log_batch(run_id, params=settings)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, number, now, step) for name, number in numbers.items()]
        self._client.log_batch(self.stored["run_id"], metrics=metrics)

    def close(self, ended: Ended) -> None:
        status = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ended]
        self._client.set_terminated(self.stored["run_id"], status)


class Trackio(Tracker):
    """A run of Trackio, named after the output folder; the variables TRACKIO_PROJECT and TRACKIO_SPACE_ID count."""

    library = "trackio"

    def __init__(self, run: Reported, stored: Mapping[str, Any]) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        super().__init__(run, stored)
        self.stored = {
            "project": os.environ.get("TRACKIO_PROJECT") or PROJECT,
            "name": f"{run.name}-{uuid.uuid4().hex[:6]}",  # other runs have folders of the same name
        } | self.stored
        self._trackio = trackio
        # Before 0.1 a run of the same name was always continued, and a step was a number like the others.
        resume = {"resume": "allow"} if _takes(trackio.init, "resume") else {}
        self._has_steps = _takes(trackio.log, "step")
        trackio.init(**self.stored, config=dict(run.settings), **resume)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._has_steps:
            self._trackio.log(dict(numbers), step=step)
        else:
            self._trackio.log({"step": step, **numbers})

    def close(self, ended: Ended) -> None:
        self._trackio.finish()


KINDS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Iterable[str], output: pathlib.Path) -> None:
    """Raises UserError if a tracker cannot work here for a run with this output folder.

    TensorBoard's library, which is there by default, may be missing: `Trackers` then says so.
    """
    for name in names:
        kind = KINDS[name]
        if name != "tensorboard" and not _installed(kind.library):
            raise UserError(f"report_to: {kind.library} is not installed: pip install '{PROJECT}[{name}]'")
        if _installed(kind.library):
            kind.check(output)


class Trackers:
    """The trackers of a run together. A remote one that fails is left out for the rest of the run, with one line."""

    def __init__(self, names: Collection[str], run: Reported) -> None:
        """Opens them; each gets what OUTPUT/trackers.json holds of it.

        Raises:
            UserError: a tracker cannot begin or continue its run.
        """
        self.notices: list[str] = []
        self._open: dict[str, Tracker] = {}
        path = run.output / TRACKERS_FILE
        before = read_json(path) if run.keep_to >= 0 and path.exists() else {}
        for name in names:
            kind = KINDS[name]
            if not _installed(kind.library):
                self.notices.append(f"{kind.library} is not installed: nothing is reported to {name}")
                continue
            stored = before.get(name)
            try:
                self._open[name] = kind(run, stored if isinstance(stored, dict) else {})
            except Exception as error:  # the type depends on the library
                if not kind.remote:
                    raise
                self.close("failed")
                raise UserError(f"report_to: {name}: {first_line(error)}") from error
        known = {name: tracker.stored for name, tracker in self._open.items() if tracker.stored}
        if known and known != before:
            with output_file(path) as draft:
                draft.write_text(json.dumps({**before, **known}, indent=2) + "\n", encoding="utf-8")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows the numbers of one step."""
        for name, tracker in [*self._open.items()]:
            self._try(name, lambda tracker=tracker: tracker.write(step, numbers))

    def close(self, ended: Ended) -> None:
        """Tells how the run ended."""
        for name, tracker in [*self._open.items()]:
            self._try(name, lambda tracker=tracker: tracker.close(ended))
        self._open = {}

    def _try(self, name: str, act: Any) -> None:
        try:
            act()
        except Exception as error:  # the type depends on the library
            if not self._open[name].remote:
                raise
            failed = self._open.pop(name)
            with contextlib.suppress(Exception):
                failed.abandon()
            _log.warning(f"report_to: {name} failed and is left out from here on: {first_line(error)}")


def _installed(library: str) -> bool:
    if library in sys.modules:
        return sys.modules[library] is not None
    return importlib.util.find_spec(library) is not None


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters
