"""What devices exchange, read from the compiled program."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest

from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.memory import Workload, training_forecast
from tests.mesh import trial
from tests.parity import COMPILER_OPTIONS

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
    with_mesh = trial.prepared(trial.CASES["queries"], "data=1").step.as_text()
    assert "num_partitions = 1 " in with_mesh and "sharding" not in with_mesh
    assert not re.search(r"all_reduce|all_gather|all_to_all|manual_computation", with_mesh)


def test_no_weight_travels_to_tokens() -> None:
    """With an `expert` axis only rows, their experts and weights travel, and gradients of what every device holds."""
    case = trial.CASES["few adapters"]
    case = case._replace(config=case.config.replace(moe_intermediate_size=192))  # a weight is larger than all rows
    found = exchanges(trial.prepared(case, "expert=4").step.compile(COMPILER_OPTIONS).as_text())
    largest = {name: max(each.elements for each in found if each.name == name) for name, _ in found}
    assert largest.keys() == {"all-reduce", "all-gather", "all-to-all"}
    assert largest["all-gather"] <= 4 * 4  # how many rows go from each device to each
    frozen, trained = trial.weights(case)
    share = min(frozen[path][0].size // 4 for path in ("sparse.gate_up_proj", "sparse.down_proj"))
    rows = trial.SEQUENCES // 4 * trial.LENGTH * case.config.num_experts_per_tok
    assert largest["all-to-all"] == 4 * rows * case.config.hidden_size < share
    everywhere = sum(
        array.size for path, array in trained.items() if not path.startswith(("sparse.gate_up", "sparse.down"))
    )
    statistics = 4 * case.config.num_hidden_layers * case.config.num_experts
    assert sum(each.elements for each in found if each.name == "all-reduce") <= everywhere + statistics


def test_only_keys_and_values_are_gathered_for_a_sequence() -> None:
    """With a `context` axis the loops over layers, forwards and backwards, gather keys and values and nothing else."""
    case = trial.CASES["queries"]
    case = case._replace(config=case.config.replace(num_key_value_heads=1))  # keys are smaller than hidden states
    found = exchanges(trial.prepared(case, "context=4").step.compile(COMPILER_OPTIONS).as_text())
    tokens = trial.SEQUENCES * trial.LENGTH
    keys = tokens * case.config.head_dim
    assert sorted(each.elements for each in found if each.name == "all-gather") == [tokens, *[keys] * 4]
    assert [each.elements for each in found if each.name == "reduce-scatter"] == [keys // 4] * 2
    trained = sum(array.size for array in trial.weights(case)[1].values())
    statistics = 4 * case.config.num_hidden_layers * case.config.num_experts
    assert {each.name for each in found} == {"all-reduce", "all-gather", "reduce-scatter"}
    assert trained <= sum(each.elements for each in found if each.name == "all-reduce") <= trained + statistics


def test_each_weight_is_put_together_once_a_pass() -> None:
    """With `fsdp` the bodies of the two loops over layers, forwards and backwards, gather each shared array once."""
    case = trial.CASES["few adapters"]
    ready = trial.prepared(case, "fsdp=4")
    found = exchanges(ready.step.compile(COMPILER_OPTIONS).as_text())
    assert {each.name for each in found} == {"all-reduce", "all-gather", "reduce-scatter"}
    stored = {**ready.frozen, **ready.state.trainable}
    shared = {path: array for path, array in stored.items() if not array.is_fully_replicated}
    assert {"attention.q_proj", "attention.o_proj", "sparse.gate_up_proj", "sparse.down_proj"} <= shared.keys()
    of_a_layer = sum(array[0].size for array in shared.values())
    assert sum(each.elements for each in found if each.name == "all-gather") == 2 * of_a_layer
    trained = sum(array.size for array in ready.state.trainable.values())
    statistics = 4 * case.config.num_hidden_layers * case.config.num_experts
    assert sum(each.elements for each in found if each.name != "all-gather") <= trained + statistics


@pytest.mark.parametrize(("mesh", "name"), [("data=8", "adapters"), ("fsdp=2,expert=4", "adapters"), ("fsdp=8", "NF4")])
def test_the_forecast_counts_what_lies_on_a_device(mesh: str, name: str) -> None:
    case, shape = trial.CASES[name], MeshShape.parse(mesh)
    assert case.lora is not None
    work = Workload(case.config, case.lora, 1, 8, "float32", quantize="nf4" if case.nf4 else None, mesh=shape)
    parts = {part.name.split(" (")[0]: part.bytes for part in training_forecast(work).parts}
    place = Placement(shape, case.config, case.lora)
    for arrays, part in zip(trial.weights(case), ("parameters", "adapters"), strict=True):
        placed = place.place(arrays).values()
        assert parts[part] == sum(array.addressable_shards[0].data.nbytes for array in placed)


def test_data_adds_up_gradients_and_nothing_else() -> None:
    case = trial.CASES["queries"]
    found = exchanges(trial.prepared(case, "data=8").step.compile(COMPILER_OPTIONS).as_text())
    trained = sum(array.size for array in trial.weights(case)[1].values())
    assert {each.name for each in found} == {"all-reduce"}
    statistics = 4 * case.config.num_hidden_layers * case.config.num_experts
    assert trained <= sum(each.elements for each in found) <= trained + statistics
