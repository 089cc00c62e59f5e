"""Pairs of runs: the differences and their intervals, what is trained again, and what is refused."""

from __future__ import annotations

import csv
import math
import pathlib
import shutil
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.routing.__main__ import main
from jaxmoe.runs.paired import differences, half_width
from jaxmoe.train import paired
from jaxmoe.train.settings import TrainConfig
from tests.test_runs import row, write_run

T_OF_4 = 2.7764451051977987  # the 97.5 % point of Student's t with 4 degrees of freedom, from its tables


def test_the_interval_is_student_s() -> None:
    values = [0.3, 0.1, 0.4, 0.1, 0.5]
    mean = sum(values) / 5
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 4)
    assert half_width(np.asarray(values)) == pytest.approx(T_OF_4 * deviation / math.sqrt(5))
    assert math.isnan(half_width(np.asarray([0.3])))
    pairs = [({"loss": 2.0, "eval_loss": 1.0, "of A": 1.0}, {"loss": 2.5, "eval_loss": 1.0 + v}) for v in values]
    held_out, loss = differences(pairs)
    assert (held_out.name, loss.name) == ("eval_loss", "loss")
    assert held_out.difference == pytest.approx(mean) and held_out.pairs == 5
    assert held_out.high - held_out.difference == pytest.approx(half_width(np.asarray(values)))
    assert (loss.a, loss.b, loss.low, loss.high) == (2.0, 2.5, 0.5, 0.5)


class Trainer:
    """Stands for training: its runs have a loss that depends on the learning rate and the seed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: list[str] = []
        self.stops_at: str | None = None
        monkeypatch.setattr(paired, "train", self)
        monkeypatch.setattr(paired, "prepare", self.prepare)
        monkeypatch.setattr(paired, "previous_identity", lambda settings: None)

    def prepare(self, settings: TrainConfig, previous: None) -> Any:
        """A plan of which only the held-out records and the end of reading are known."""
        return SimpleNamespace(
            data=SimpleNamespace(close=lambda: None), identity={"eval_data": str(settings.eval_data)}
        )

    def __call__(self, settings: TrainConfig) -> dict[str, Any]:
        name = settings.output.name
        self.trained.append(name)
        if name == self.stops_at:
            return {"stopped_by": int(signal.SIGTERM)}
        shutil.rmtree(settings.output, ignore_errors=True)
        loss = 3.0 + settings.seed + settings.learning_rate * (1 + settings.seed)
        rows = [{"step": 0, "eval_loss": 9.0}, row(1), row(2, eval_loss=loss)]
        write_run(settings.output, rows, identity={"eval_data": str(settings.eval_data), "max_steps": 2})
        return {"stopped_by": None}


@pytest.fixture
def files(tmp_path: pathlib.Path) -> list[str]:
    for name, rate in (("a", 1.0), ("b", 2.0)):
        text = f'model = "m"\ndata = "d"\neval_data = "e"\nlearning_rate = {rate}\n'
        (tmp_path / f"{name}.toml").write_text(text)
    return ["ab", *(str(tmp_path / f"{name}.toml") for name in "ab"), "--out", str(tmp_path / "out")]


def table(tmp_path: pathlib.Path) -> dict[str, list[str]]:
    with (tmp_path / "out" / "differences.csv").open() as file:
        return {line[0]: line[1:] for line in csv.reader(file)}


def test_pairs_are_trained_compared_and_continued(
    files: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer(monkeypatch)
    trainer.stops_at = "B-seed1"
    assert main([*files, "--seeds", "3"]) == 128 + signal.SIGTERM
    assert trainer.trained == ["A-seed0", "B-seed0", "A-seed1", "B-seed1"]
    printed = capsys.readouterr()
    assert "the same command continues from here" in printed.err
    assert "learning_rate: 1.0 in A, 2.0 in B" in printed.out
    assert table(tmp_path)["eval_loss"][-1] == "1"

    trainer.stops_at, trainer.trained = None, []
    assert main([*files, "--seeds", "3"]) is None
    assert trainer.trained == ["B-seed1", "A-seed2", "B-seed2"]
    a, b, difference, low, high, pairs = map(float, table(tmp_path)["eval_loss"])
    assert (a, b, difference, pairs) == (6.0, 8.0, 2.0, 3)
    assert high - 2 == 2 - low == pytest.approx(half_width(np.asarray([1.0, 2.0, 3.0])))
    page = (tmp_path / "out" / "differences.html").read_text()
    assert "<td>learning_rate</td><td>1.0</td><td>2.0</td><td></td>" in page and "tokens_per_second</td>" not in page
    assert "expert_load_cv" in page and "B-seed2" in page and "3 of 3 pairs" in capsys.readouterr().out

    trainer.trained = []
    assert main([*files, "--seeds", "4"]) is None
    assert trainer.trained == ["A-seed3", "B-seed3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b", 'model = "m"\ndata = "d"\n', "B: expected eval_data or eval_fraction"),
        ("b", 'model = "m"\neval_data = "e"\n', "B: data: expected records to train on, found none"),
        ("a", 'model = "m"\ndata = "d"\neval_data = "e"\npush_to_hub = "x/y"\n', "A: push_to_hub: expected none"),
        (
            "b",
            'model = "m"\ndata = "d"\neval_data = "other"\n',
            "A and B: expected the same held-out records, found others in B",
        ),
        ("b", "lora_rank = 3\n", "b.toml: 'lora_rank': expected the name of a flag"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    name: str, text: str, message: str, files: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(monkeypatch)
    (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        main(files)
    assert not trainer.trained and not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_refused(
    files: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(monkeypatch)
    with pytest.raises(UserError, match="expected a new or empty folder, or one of this command; found one with other"):
        main([*files[:-1], str(tmp_path)])
    assert not trainer.trained


def test_runs_of_other_settings_are_refused(
    files: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(monkeypatch)
    main([*files, "--seeds", "1"])
    (tmp_path / "b.toml").write_text((tmp_path / "b.toml").read_text() + "lora_r = 3\n")
    with pytest.raises(UserError, match="found B-seed0 with another lora_r; name another folder with --out"):
        main([*files, "--seeds", "1"])
    (tmp_path / "out" / "finished.json").write_text("[]")
    with pytest.raises(UserError, match=r"finished\.json: expected a JSON object"):
        main([*files, "--seeds", "1"])
    assert trainer.trained == ["A-seed0", "B-seed0"]
