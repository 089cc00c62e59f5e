"""What devices exchange, read from the compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from tests.mesh import trial

_OPERATION = re.compile(
    r"= (?P<type>.*?) (?P<name>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute)"
    r"(-start)?\("
)
_ARRAY = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


class Exchange(NamedTuple):
    """A collective operation, and how many elements its results have on a device."""

    name: str
    elements: int


def exchanges(program: str) -> list[Exchange]:
    """Every collective operation in a compiled program's text."""
    return [
        Exchange(
            match["name"],
            sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in _ARRAY.findall(match["type"])),
        )
        for match in _OPERATION.finditer(program)
    ]


def test_one_device_runs_the_program_without_a_mesh() -> None:
    with_mesh = trial.prepared(trial.CASES["adapters"], "data=1").step.as_text()
    assert "num_partitions = 1 " in with_mesh and "sharding" not in with_mesh
    assert not re.search(r"all_reduce|all_gather|all_to_all|manual_computation", with_mesh)


def test_data_adds_up_gradients_and_nothing_else() -> None:
    case = trial.CASES["adapters"]
    found = exchanges(trial.prepared(case, "data=8").step.compile().as_text())
    trained = sum(array.size for array in trial.weights(case)[1].values())
    assert {each.name for each in found} == {"all-reduce"}
    statistics = 4 * case.config.num_hidden_layers * case.config.num_experts
    assert trained <= sum(each.elements for each in found) <= trained + statistics
