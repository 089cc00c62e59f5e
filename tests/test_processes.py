"""How the processes of a run find each other, and checksums that their parts add up to."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmoe.distributed import launch
from jaxmoe.errors import UserError
from jaxmoe.store.element_sums import checksum_of, sum_of_part


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 1, 8)])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8"])
def test_parts_add_up_to_the_checksum_of_the_whole(shape: tuple[int, ...], dtype: str) -> None:
    rng = np.random.default_rng(1)
    whole = rng.integers(0, 100, shape).astype(dtype)
    start = (0,) * len(shape)
    expected = checksum_of([sum_of_part(whole, start, shape)])
    for axis, size in enumerate(shape):
        halves = [slice(0, size // 2), slice(size // 2, size)]
        sums = []
        for half in halves:
            index = (*[slice(None)] * axis, half)
            begins = [half.start if each == axis else 0 for each in range(len(shape))]
            sums.append(sum_of_part(whole[index], begins, shape))
        assert checksum_of(sums) == expected
    if whole.size > 1:
        changed, swapped = whole.copy(), whole.copy()
        changed.flat[-1] += 1
        swapped.flat[[0, 1]] = swapped.flat[0] + 1, swapped.flat[0]
        assert len({checksum_of([sum_of_part(each, start, shape)]) for each in (whole, changed, swapped)}) == 3


def named(coordinator: str, count: int, index: int) -> dict[str, object]:
    return {"coordinator": coordinator, "num_processes": count, "process_id": index}


def arguments(**given: object) -> object:
    import argparse

    flags = {"coordinator": None, "num_processes": None, "process_id": None, "heartbeat": launch.HEARTBEAT} | given
    return argparse.Namespace(**flags)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "node:1234"}, "expected all three or none, found --coordinator"),
        ({"num_processes": 2}, "expected all three or none, found --num-processes"),
        (named("node", 2, 0), "coordinator: expected HOST:PORT, found 'node'"),
        (named("node:0", 2, 0), "coordinator: expected HOST:PORT"),
        (named("node:1", 2, 2), "process_id: expected a number from 0 to 1, found 2"),
        (named("node:1", 0, 0), "num_processes: expected at least 1, found 0"),
        ({"heartbeat": 3}, "heartbeat: expected at least 10 seconds, found 3"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launch.start(arguments(**given))  # pyright: ignore[reportArgumentType]


SLURM = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # in the batch script itself, outside srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_a_launcher_of_several_is_noticed(environment: dict[str, str], several: bool) -> None:
    assert launch.is_one_of_several(environment) == several


@pytest.mark.parametrize(
    ("environment", "shares"),
    [
        ({}, False),
        ({"SLURM_TASKS_PER_NODE": "1(x2)"}, False),  # one process for all GPUs of a node
        ({"SLURM_TASKS_PER_NODE": "4(x2)"}, True),
        ({"SLURM_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, True),
        ({"SLURM_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0"}, False),  # each sees its own
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
    ],
)
def test_processes_that_see_the_same_devices_take_one_each(environment: dict[str, str], shares: bool) -> None:
    assert launch.shares_its_devices(environment) == shares
