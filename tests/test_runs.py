"""Runs on disk: how numbers are thinned, what the page of one or several runs says, and the commands that write it."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
from typing import Any

import numpy as np
import pytest

from jaxmoe.errors import UserError
from jaxmoe.figures.figure import Heatmap, Lines, Samples, Table
from jaxmoe.figures.output import save_all
from jaxmoe.runs import history
from jaxmoe.runs.__main__ import main
from jaxmoe.runs.history import History
from jaxmoe.runs.plots import of_runs
from jaxmoe.runs.record import Change, ExpertLoad, Sample, read_run, read_samples
from jaxmoe.runs.report import about, distinct_names, write_report
from jaxmoe.train.run_page import RunPage

HOSTILE = "</script><script>alert(1)</script><!--\"'&"
DEPTH = 2


def row(step: int, **more: Any) -> dict[str, Any]:
    numbers = {"step": step, "loss": 4.0 - 0.1 * step, "learning_rate": 0.01, "grad_norm": 1.0 + step, "aux_loss": 2.0}
    numbers |= {"tokens_per_second": None if step == 1 else 100.0 * step, "eval_loss": None}
    return numbers | {"expert_load_cv": [0.5, 0.25 * step], "expert_load_entropy": [0.9, 1.0]} | more


def write_run(folder: pathlib.Path, rows: list[dict[str, Any]], **record: Any) -> pathlib.Path:
    folder.mkdir(parents=True)
    settings = {"model": HOSTILE, "data": "d.jsonl", "learning_rate": 0.01, "adapter": None, "lora_targets": ["router"]}
    content = {"settings": settings, "identity": {"max_steps": 4}, "device": "cpu", "versions": {}} | record
    (folder / "train_config.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


ROWS = [{"step": 0, "eval_loss": 5.0}, row(1), row(2, eval_loss=3.0), row(3), row(4, eval_loss=3.5)]


@pytest.fixture
def run(tmp_path: pathlib.Path) -> pathlib.Path:
    return write_run(tmp_path / "runs" / "first", ROWS, changes=[{"after_step": 2, "max_steps": [2, 4]}])


# --- the numbers


@pytest.mark.parametrize("evaluate_every", [1000, 7, 1])
def test_a_long_history_is_thinned(evaluate_every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_ROWS", 20)
    long = History()
    for step in range(1, 501):
        evaluation = {} if step % evaluate_every else {"eval_loss": 2.0}
        long.add({"step": step, "loss": 1.0} | evaluation)
    steps = long.steps()
    assert 5 <= len(steps) <= 21
    assert steps[0] == 1
    assert steps[-1] == long.last("step") == 500
    assert np.diff(steps).min() > 0 and np.diff(steps).max() <= 64
    assert np.isfinite(long.column("eval_loss")).sum() >= (5 if evaluate_every < 10 else 0)
    assert long.every == {1000: 64, 7: 64, 1: 1}[evaluate_every]


def test_what_is_no_number_is_left_out() -> None:
    odd = History()
    odd.add({"step": 1, "loss": "3", "x": True, "y": [1, None], "z": [], "huge": 10**400, "n": float("nan"), "ok": [1]})
    assert odd.rows == [{"step": 1, "ok": [1]}]
    assert (odd.names(per_layer=False), odd.names(per_layer=True)) == ([], ["ok"])
    assert odd.last("loss") is None


def test_layers_of_different_number() -> None:
    found = History()
    found.add({"step": 1, "load": [1.0, 2.0]})
    found.add({"step": 2})
    found.add({"step": 3, "load": [3.0]})
    np.testing.assert_array_equal(found.matrix("load"), [[1, 2], [np.nan, np.nan], [3, np.nan]])


# --- the record


def test_the_record(run: pathlib.Path) -> None:
    found = read_run(run)
    before, after, lowest = found.held_out()
    assert (before, after, lowest) == (5.0, 3.5, (3.0, 2))
    assert found.changes == [Change(2, "max_steps", 2, 4)]
    cells = [HOSTILE, "d.jsonl", "4 of 4", "3.6000", "5.0000 to 3.5000", "3.0000 at step 2", "300", "cpu"]
    assert about(found) == cells
    found.settings["data"] = ["a.jsonl:2", "b.parquet"]
    assert about(found)[1] == "a.jsonl:2, b.parquet"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_config.json", None, "expected the folder of a run, found no train_config.json in it"),
        ("train_config.json", "[]", "expected a JSON object, found list"),
        ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl:1: expected an object with a step"),
        ("metrics.jsonl", "{\n", "metrics.jsonl:1: expected JSON"),
        ("metrics.jsonl", f'{{"step": {2**63}}}\n', "metrics.jsonl:1: expected an object with a step"),
        ("samples.jsonl", '{"step": 1, "prompt": 5}\n', "samples.jsonl:1: expected an object with step, prompt and"),
    ],
)
def test_a_damaged_record_is_one_line(file: str, content: str | None, message: str, run: pathlib.Path) -> None:
    (run / file).unlink(missing_ok=True)
    if content is not None:
        (run / file).write_text(content)
    with pytest.raises(UserError) as error:
        read_run(run)
    assert message in str(error.value)


def test_a_pipe_in_a_run_is_not_read(run: pathlib.Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl: expected a file, found a pipe"):
        read_run(run)


def test_a_record_of_odd_types_is_still_read(run: pathlib.Path) -> None:
    (run / "train_config.json").write_text('{"settings": [], "identity": 3, "changes": [1, {"after_step": "x"}]}')
    found = read_run(run)
    assert (found.settings, found.total_steps, found.changes) == ({}, None, [])


# --- the pages


def figures_of(*folders: pathlib.Path) -> dict[str, Any]:
    runs = [read_run(folder) for folder in folders]
    return {figure.key: figure for figure in of_runs(runs, distinct_names(runs))}


def test_the_figures_of_a_run(run: pathlib.Path) -> None:
    figures = figures_of(run)
    names = ["loss", "learning_rate", "grad_norm", "tokens_per_second", "aux_loss", "expert_load_cv"]
    assert [*figures] == [*names, "expert_load_entropy", "changes", "settings"]
    losses = figures["loss"]
    assert isinstance(losses, Lines)
    np.testing.assert_array_equal(losses.x, range(5))
    np.testing.assert_array_equal(losses.series[1].y, [5, np.nan, 3, np.nan, 3.5])
    assert [series.bridged for series in losses.series] == [False, True]
    load = figures["expert_load_cv"]
    assert isinstance(load, Heatmap)
    np.testing.assert_array_equal(load.values, [[[0.5] * 4, [0.25, 0.5, 0.75, 1.0]]])
    assert load.column_names == (1, 2, 3, 4)
    assert isinstance(figures["changes"], Table)
    assert ("lora_targets", '["router"]') in figures["settings"].body


def test_the_load_of_each_expert(run: pathlib.Path) -> None:
    page = RunPage(run, keep_to=4)
    page.add(row(5), ExpertLoad.of(5, np.asarray([[3, 1], [0, 0]])))
    page.draw()
    assert json.loads((run / "expert_load.json").read_text()) == {"step": 5, "load": [[1.5, 0.5], [0.0, 0.0]]}
    load = figures_of(run)["expert_load"]
    assert (load.title, load.center) == ("Expert load at step 5", 1.0)
    np.testing.assert_array_equal(load.values, [[[1.5, 0.5], [0, 0]]])
    # A run that continues from an earlier step has it no longer.
    RunPage(run, keep_to=4).draw()
    assert "Expert load at step" not in (run / "report.html").read_text()
    for wrong in ('{"step": 1, "load": [[1], [1, 2]]}', '{"step": 1, "load": [1]}', '{"load": [[1.0]]}'):
        (run / "expert_load.json").write_text(wrong)
        with pytest.raises(UserError, match="expected a step and the load of each layer's experts"):
            read_run(run)


def test_several_runs_in_one_figure(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    settings = {"model": HOSTILE, "learning_rate": 0.1, "lora_targets": ["router"], "data": "d.jsonl"}
    rows = [row(2, eval_loss=2.0, rewards=0.5), row(4)]
    other = write_run(tmp_path / "other" / "first", rows, settings=settings)
    figures = figures_of(run, other)
    names = [str(run), str(other)]
    losses = figures["loss"]
    np.testing.assert_array_equal(losses.x, range(5))
    assert [series.name for series in losses.series] == names, "folders of one name are told apart"
    there = np.isfinite(losses.series[1].y)
    np.testing.assert_array_equal(losses.x[there], [2, 4])
    assert [series.name for series in figures["rewards"].series] == names[1:]
    np.testing.assert_allclose(figures["expert_load_cv"].series[1].y[there], [0.5, 0.75])
    assert figures["settings"].header == ("setting", *names)
    assert figures["settings"].body == (("learning_rate", "0.01", "0.1"),)


def test_a_run_without_numbers_has_a_page(tmp_path: pathlib.Path) -> None:
    empty = write_run(tmp_path / "empty", [])
    assert [*figures_of(empty)] == ["settings"]
    write_report([read_run(empty)], empty / "report.html")


def test_the_page_is_html_that_no_text_breaks(run: pathlib.Path) -> None:
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed")
    samples = [{"step": step, "prompt": HOSTILE, "text": f"{step} {HOSTILE}"} for step in (0, 4, 6)]
    (run / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples) + '{"step": 7, "pro')
    page = RunPage(run, keep_to=4)
    page.add(row(5, eval_loss=2.5))
    page.draw([Sample(5, "p", "t")])
    content = (run / "report.html").read_text()
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    tree = parser.parse(content)
    assert len(tree.findall(".//script")) == 2
    assert HOSTILE in tree.find(".//tbody/tr").itertext()
    numbers = json.loads(tree.find(".//script[@id='figures']").text)
    kinds = {figure["key"]: figure for figure in numbers}
    assert kinds["samples"]["page_names"] == ["step 0", "step 4", "step 5"], "what a later step wrote is dropped"
    assert kinds["samples"]["texts"][1] == [f"4 {HOSTILE}"]
    assert [sample.step for sample in read_samples(run)] == [0, 4, 5]
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", content), "the page needs no network"
    assert "lowest held-out loss" in content and "2.5000 at step 5" in content


def test_a_browser_draws_every_figure(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    sample = {"step": 4, "prompt": HOSTILE, "text": "the end"}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    runs = [read_run(run), read_run(write_run(tmp_path / "second", ROWS))]
    write_report(runs, tmp_path / "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [browser, *options, "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    keys = [figure.key for figure in of_runs(runs, distinct_names(runs))]
    assert re.findall(r'<section id="(\w+)"', done.stdout) == keys
    assert done.stdout.count("the end") == 2, "once drawn, once in the numbers"
    # Of each line the path and, as it has few points, its dots.
    drawn = done.stdout.partition('<section id="eval_loss"')[2].partition("</section>")[0]
    assert len(re.findall(r'<path d="M[^"]+L', drawn)) == 2
    assert drawn.count("<circle") == 2 * 3 + 1


def test_a_page_that_cannot_be_drawn_does_not_end_the_run(
    run: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    page = RunPage(run, keep_to=4)
    monkeypatch.setattr("jaxmoe.train.run_page.write_report", lambda *_: 1 / 0)
    page.draw()
    page.draw()
    said = "report.html: not drawn from here on: ZeroDivisionError: division by zero"
    assert [record.getMessage() for record in caplog.records] == [said]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxmoe.train.run_page.write_report", full)
    with pytest.raises(OSError, match="No space left"):
        RunPage(run, keep_to=4).draw()


def test_samples_show_the_last_of_each_run(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = write_run(tmp_path / "second", ROWS)
    for folder in (run, other):
        lines = [{"step": step, "prompt": "p", "text": f"{folder.name} {step}"} for step in (0, 4)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = figures_of(run, other)["samples"]
    assert isinstance(samples, Samples)
    assert samples.page_names == ("first, step 4", "second, step 4")
    assert samples.texts == (("first 4",), ("second 4",))
    assert [*samples.csv_lines()][1] == ["first, step 4", "p", "first 4"]


def test_the_kinds_of_figures_are_pictures_and_tables(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib")
    (run / "samples.jsonl").write_text(json.dumps({"step": 4, "prompt": "$1", "text": "$"}) + "\n")
    figures = [figures_of(run)[key] for key in ("loss", "expert_load_cv", "samples")]
    save_all(figures, tmp_path)
    for kind, suffix in (("png", "png"), ("csv", "csv")):
        assert {file.name for file in (tmp_path / kind).iterdir()} == {f"{figure.key}.{suffix}" for figure in figures}
    assert ",1,3,0.75\n" in (tmp_path / "csv" / "expert_load_cv.csv").read_text(), "layer 1 at step 3"


# --- the commands


def test_list(run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "a" / "b" / "deep", ROWS[:2])
    write_run(tmp_path / "runs" / "a" / "b" / "c" / "too deep", ROWS[:2])
    main(["list", str(tmp_path / "runs")])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "of 4" in line]) == 2
    assert any("runs/first" in line and "3.0000 at step 2" in line for line in lines)
    (run / "metrics.jsonl").write_text("{}\n")
    main(["list", str(tmp_path / "runs")])
    printed = capsys.readouterr()
    assert "runs/first/metrics.jsonl:1: expected an object with a step" in printed.err
    assert printed.out.count("of 4") == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected runs in or below it, found none"):
        main(["list", str(tmp_path / "empty")])
    with pytest.raises(UserError, match="none: expected a folder, found none"):
        main(["list", str(tmp_path / "none")])


def test_compare_and_report(
    run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "second", ROWS)
    monkeypatch.chdir(tmp_path)
    main(["compare", str(run), str(other)])
    assert "<title>Runs first, second</title>" in (tmp_path / "compare.html").read_text()
    main(["report", str(run)])
    assert "<title>Run first</title>" in (run / "report.html").read_text()
    assert capsys.readouterr().out.splitlines() == ["wrote compare.html", f"wrote {run}/report.html"]
    for same in ([str(run)], [str(run), f"{run}/../first"]):
        with pytest.raises(UserError, match="compare: expected two runs or more, each once"):
            main(["compare", *same])
