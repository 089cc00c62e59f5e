"""The notebooks run from top to bottom and answer their question; the committed notebooks contain their output."""

from __future__ import annotations

import re

import pytest

from jaxmoe.errors import UserError

nbformat = pytest.importorskip("nbformat", reason="no nbformat: a machine with a GPU tests with what it has")

from notebooks.__main__ import FOLDER, execute, main, names, read_settings, with_settings  # noqa: E402 - needs what is asked for above

# Fewer steps, tokens and records than in the committed notebooks: every cell runs, in a third of the time.
SMALL = {"STEPS": "6", "TOKENS": "1000", "RECORDS": "24", "HELD_OUT": "8", "BATCH": "2", "SEEDS": "2"}


def answer_of(notebook) -> str:
    """What the last cell displays."""
    (output,) = notebook.cells[-1].outputs
    return output["data"]["text/markdown"]


def images_of(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def settings_of(name: str) -> str:
    """The first cell of code."""
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def test_there_are_eight_each_with_one_question():
    assert len(names()) == 8
    for name in names():
        first = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells[0].source
        assert re.fullmatch(r"# \d\. .+\n\n\*\*Question: .+\?\*\*\n\n.+", first)


@pytest.mark.parametrize("name", names())
def test_the_committed_notebook_carries_its_output(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # top to bottom, once
    assert images_of(notebook) >= 1
    assert re.match(r"\*\*Answer\.\*\* .*\d", answer_of(notebook))


@pytest.mark.parametrize("name", names())
def test_a_fresh_run_answers_as_well(name):
    notebook = execute(
        name, {setting: value for setting, value in SMALL.items() if f"{setting} = " in settings_of(name)}
    )
    assert images_of(notebook) >= 1
    answer = answer_of(notebook)
    assert re.match(r"\*\*Answer\.\*\* .*\d", answer) and "nan" not in answer


def test_settings_of_the_first_cell_can_be_others():
    source = 'MODEL = "a/b"  # change this line\nSTEPS = 40'
    assert with_settings(source, {"MODEL": "'c'", "STEPS": "6"}) == "MODEL = 'c'\nSTEPS = 6"
    with pytest.raises(UserError, match=r"--set: expected .* first cell \(MODEL, STEPS\), found 'STEP'"):
        with_settings(source, {"STEP": "6"})
    assert read_settings(["A=6", "B=-1e-3", "C=0.1", "D=it's"]) == {"A": "6", "B": "-1e-3", "C": "0.1", "D": '"it\'s"'}
    with pytest.raises(UserError, match="--set: expected NAME=VALUE, found 'STEPS'"):
        main(["--set", "STEPS"])


def test_a_mistake_of_the_user_in_a_cell_is_one_line(tmp_path, monkeypatch):
    exceptions = pytest.importorskip("nbclient.exceptions", reason="no nbclient: no notebook can be executed")

    def fail(name, settings):
        raise exceptions.CellExecutionError("a traceback", "UserError", "/nope: expected a model folder, found none")

    monkeypatch.setattr("notebooks.__main__.execute", fail)
    with pytest.raises(UserError, match=r"^3_parity: /nope: expected a model folder, found none$"):
        main(["3_parity", "--output", str(tmp_path)])
    with pytest.raises(UserError, match=r"notebook: expected one of 1_quick_start, .*; found 'nope'"):
        main(["3_parity", "nope", "--output", str(tmp_path)])
