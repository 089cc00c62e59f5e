"""The notebooks run from top to bottom and answer their question; the committed notebooks contain their output."""

from __future__ import annotations

import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="no nbformat: a machine with a GPU tests with what it has")

from notebooks.__main__ import FOLDER, execute, names  # noqa: E402 - needs what is asked for above


def answer_of(notebook) -> str:
    """What the last cell displays."""
    (output,) = notebook.cells[-1].outputs
    return output["data"]["text/markdown"]


def images_of(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


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
    notebook = execute(name)
    assert images_of(notebook) >= 1
    answer = answer_of(notebook)
    assert re.match(r"\*\*Answer\.\*\* .*\d", answer) and "nan" not in answer
