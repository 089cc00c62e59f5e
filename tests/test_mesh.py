"""Meshes: how they are named, what is refused; and the tests that need several devices, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jaxmoe.distributed import chunks
from jaxmoe.distributed.mesh import MeshShape, automatic
from jaxmoe.errors import UserError
from tests.conftest import ROOT
from tests.mesh import DEVICES


@pytest.mark.long
def test_on_eight_virtual_devices() -> None:
    """The smaller part of `tests/mesh`, on the CPU: the number of devices is fixed when JAX starts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "XLA_FLAGS"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": DEVICES}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not wide", "tests/mesh"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_mesh_is_read_and_written() -> None:
    assert MeshShape.parse(" data = 4") == MeshShape(data=4)
    assert MeshShape.parse("expert=2,data=3") == MeshShape(data=3, expert=2)
    assert str(MeshShape(data=4, fsdp=1, expert=2)) == "data=4,expert=2"
    assert MeshShape.parse(str(MeshShape())) == MeshShape()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected auto, or axes among data.*found ''"),
        ("4", "expected auto, or axes among data.*found '4'"),
        ("tensor=2", "expected auto, or axes among data.*found 'tensor=2'"),
        ("data=2,data=2", "expected auto, or axes once among data.*found 'data=2,data=2'"),
        ("data=0", "mesh: data: expected a whole number from 1 on, found '0'"),
        ("data=-2", "mesh: data: expected a whole number from 1 on, found '-2'"),
        ("data=two", "mesh: data: expected a whole number from 1 on, found 'two'"),
        ("data=" + "9" * 5000, "mesh: data: expected a whole number from 1 on"),
    ],
)
def test_what_is_no_mesh_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MeshShape.parse(text)


def test_devices_hold_an_early_and_a_late_chunk() -> None:
    assert chunks.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]


def test_what_devices_cannot_share_is_refused() -> None:
    with pytest.raises(UserError, match="mesh: data=4 needs 4 devices, found 2"):
        MeshShape(data=4).check_devices(2)
    with pytest.raises(
        UserError, match=r"expert: expected a divisor of the model's 12 experts \(1, 2, 3, 4, 6, 12\), found 8"
    ):
        MeshShape(expert=8).check_experts(12)
    with pytest.raises(UserError, match=r"expert: expected a divisor of the model's 0 experts \(1\), found 2"):
        MeshShape(expert=2).check_experts(0)
    with pytest.raises(UserError, match=r"batch_size: expected a multiple of 4 .*data=4\), found 6"):
        MeshShape(data=4, context=2).check_batch(6)
    with pytest.raises(UserError, match=r"seq_length: .*multiple of 8 .*context=4, .*found 100; 96 or 104 would do"):
        MeshShape(context=4).check_length(100)
    with pytest.raises(UserError, match=r"seq_length: .*multiple of 8 .*, found 5; 8 would do"):
        MeshShape(context=4).check_length(5)
    MeshShape(data=3).check_length(7)


@pytest.mark.parametrize(("devices", "batch_size", "data"), [(1, 4, 1), (8, 8, 8), (8, 4, 4), (8, 3, 1), (6, 4, 2)])
def test_auto_takes_as_many_devices_as_can_share_the_batch(devices: int, batch_size: int, data: int) -> None:
    mesh, why = automatic(devices, batch_size)
    assert mesh == MeshShape(data=data)
    idle = devices - data
    assert (f"{idle} devices stay idle" in why) == (idle > 0)
