"""Runs that continue otherwise than they began, that stop early, and that keep the best evaluation."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.store.train_state import TrainCheckpoints
from jaxmoe.train import loop
from jaxmoe.train.best import Best
from jaxmoe.train.identity import check_same_run
from jaxmoe.train.loop import train
from jaxmoe.train.optimizers import learning_rate
from jaxmoe.train.settings import TrainConfig, changeable_settings
from tests.test_identity import RECORDED
from tests.test_train import STEPS, base, compilation_cache, metrics, options, weights

__all__ = ["base", "compilation_cache"]  # fixtures


@pytest.fixture
def one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of all lengths have the learning rate of `options`, and so the program that other tests have compiled."""
    monkeypatch.setattr(loop, "learning_rate", lambda *_: learning_rate("cosine", 1e-2, 2, STEPS))


def resumed(**changes: Any) -> TrainConfig:
    paths = {name: pathlib.Path(name) for name in ("model", "data", "output")}
    values: dict[str, Any] = {**paths, "resume": True, **changes}
    return TrainConfig(**values)


# --- what a resumed run may change


@pytest.mark.parametrize(
    ("settings", "entries", "allowed"),
    [
        ({"max_steps": 9}, {"max_steps": 9}, "max_steps"),
        ({"max_steps": 9}, {"max_steps": 9, "warmup_steps": 3}, "max_steps"),
        ({}, {"max_steps": 9}, "epochs"),
        ({"epochs": 4}, {"max_steps": 9, "warmup_steps": 3}, "epochs"),
        ({"learning_rate": 0.5}, {"learning_rate": 0.5}, "learning_rate"),
        ({"schedule": "linear"}, {"schedule": "linear"}, "schedule"),
        ({"warmup_steps": 5}, {"warmup_steps": 5}, "warmup_steps"),
        ({"warmup_ratio": 0.5}, {"warmup_steps": 3}, "warmup_ratio"),
    ],
)
def test_a_change_needs_the_flag_that_the_refusal_names(
    settings: dict[str, Any], entries: dict[str, Any], allowed: str
) -> None:
    with pytest.raises(UserError, match=rf"; --allow-change {allowed} continues with the new value$"):
        check_same_run(resumed(**settings), RECORDED, RECORDED | entries)
    found = check_same_run(resumed(**settings, allow_change=(allowed,)), RECORDED, RECORDED | entries)
    assert found == {name: [RECORDED[name], value] for name, value in entries.items()}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"max_steps": 5}, "max_steps: to resume output with another value, expected more than 6, found 5"),
        ({"seq_length": 64}, "seq_length: to resume output, expected 48, found 64$"),
        ({"data": "x"}, "data: to resume output, expected the same content as before, found different content$"),
        # What makes other entries differ is named first.
        ({"data": "x", "max_steps": 7}, "data: .* found different content$"),
        ({"data": "x", "mixture": [[2.0, 5]]}, "data: to resume output, expected weights none, found 2.0$"),
        ({"mixture": [], "seq_length": 64}, "seq_length: to resume output"),
    ],
)
def test_other_changes_are_refused_in_any_case(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_same_run(resumed(allow_change=tuple(changeable_settings())), RECORDED, RECORDED | entries)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_change": ("seq_length",)}, "allow_change: expected names among .*max_steps.*; found 'seq_length'"),
        ({"allow_change": ("max_steps",), "resume": False}, "allow_change: only valid with resume or resume_from"),
        ({"keep_best": True}, "keep_best: expected eval_every with it, found none"),
        ({"patience": 2}, "patience: expected eval_every with it, found none"),
        ({"patience": 0}, "patience: expected at least 1, found 0"),
    ],
)
def test_flags_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resumed(**changes)


def test_a_setting_may_be_named_as_its_flag_is() -> None:
    assert resumed(allow_change=("max-steps", "learning_rate")).allow_change == ("max_steps", "learning_rate")


def test_the_help_names_what_may_change() -> None:
    text = TrainConfig.__dataclass_fields__["allow_change"].metadata["help"]
    assert all(name in text for name in changeable_settings())


def test_more_steps_are_the_steps_of_a_longer_run(
    base: pathlib.Path, tmp_path: pathlib.Path, one_program: None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, extended = tmp_path / "whole", tmp_path / "extended"
    common = {"merge": False}
    train(options(base, whole, max_steps=2, **common))
    train(options(base, extended, max_steps=1, **common))
    with pytest.raises(UserError, match=r"max_steps: to resume .*, expected 1, found 2; --allow-change max_steps"):
        train(options(base, extended, max_steps=2, resume=True, **common))
    train(options(base, extended, max_steps=2, resume=True, allow_change=("max_steps",), **common))
    assert "max_steps: 1 before, 2 after step 1" in capsys.readouterr().out
    assert weights(extended) == weights(whole)
    # The end of the shorter run was evaluated, too.
    assert [row["loss"] for row in metrics(extended)[1:]] == [row["loss"] for row in metrics(whole)[1:]]
    record = json.loads((extended / "train_config.json").read_text())
    assert record["changes"] == [{"after_step": 1, "max_steps": [1, 2]}]
    assert (record["identity"]["max_steps"], record["settings"]["max_steps"]) == (2, 2)


# --- the best evaluation


def test_best() -> None:
    best = Best()
    assert not best.is_over(1)
    assert Best.stored_in({"eval_loss_before": 1.0} | best.stored()) == best
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.0), (4, float("nan"))):
        best.evaluated(step, loss)
    assert best == Best(2, 2.0, 2) == Best.stored_in(best.stored())
    assert (best.is_over(2), best.is_over(3), best.is_over(None)) == (True, False, False)


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Step -> the trained arrays that a run saves at it."""
    states: dict[int, Any] = {}
    save = TrainCheckpoints.save

    def keep(self: Any, step: int, state: Any, *more: Any, **options: Any) -> None:
        states[step] = jax.tree.map(np.array, state.trainable)
        save(self, step, state, *more, **options)

    monkeypatch.setattr(TrainCheckpoints, "save", keep)
    return states


def test_the_best_evaluation_is_kept_and_written(
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    saved: dict[int, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written: list[Any] = []
    monkeypatch.setattr(loop, "export_results", lambda plan, trainable: written.append(trainable))
    losses = iter([9.0, 3.0, 2.0, 2.5, 2.2, 2.1, 1.0])
    monkeypatch.setattr(loop.Loop, "_evaluate", lambda self, state: {"eval_loss": next(losses)})
    (tmp_path / "prompts.txt").write_text("1 + 1 =\n\n2 + 2 =\n")
    prompts = {"sample_prompts": tmp_path / "prompts.txt", "sample_tokens": 2}
    common = {**prompts, "eval_every": 1, "keep_best": True, "keep_checkpoints": 1, "merge": False}

    def check(summary: dict[str, Any], steps: int, best: int, kept: list[int]) -> None:
        assert (summary["steps"], summary["best_step"]) == (steps, best)
        assert sorted(int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()) == kept
        jax.tree.map(np.testing.assert_array_equal, written.pop(), saved[best])

    check(train(options(base, tmp_path / "run", patience=2, **common)), 4, 2, [2, 4])
    said = "stopped after step 4: 2 evaluations since the lowest held-out loss, 2.0000 at step 2"
    assert said in capsys.readouterr().out
    # The run has ended: it continues only with more patience.
    check(train(options(base, tmp_path / "run", patience=2, resume=True, **common)), 4, 2, [2, 4])
    assert said in capsys.readouterr().out
    assert next(losses) == 2.1
    check(train(options(base, tmp_path / "run", patience=4, resume=True, **common | {"eval_every": 2})), 6, 6, [6])
    # Its page shows every evaluation, and what the model wrote at it.
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(each["step"], each["prompt"]) for each in samples[:2]] == [(0, "1 + 1 ="), (0, "2 + 2 =")]
    assert [each["step"] for each in samples[::2]] == [0, 1, 2, 3, 4, 6]
    assert "1.0000 at step 6" in (tmp_path / "run" / "report.html").read_text()
