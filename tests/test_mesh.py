"""Meshes: how they are named, what is refused; and the tests that need several devices, in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16)
import numpy as np
import pytest

from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.distributed import chunks, copy_engines
from jaxmoe.distributed.collectives import in_pieces
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.errors import UserError
from jaxmoe.memory import Workload, training_forecast
from jaxmoe.mesh_choice import Devices, choose_mesh
from jaxmoe.model.mesh_flag import Inputs, inference_mesh
from jaxmoe.ops.dispatch import gathering_sends_less
from jaxmoe.presets import PRESETS
from tests.conftest import ROOT
from tests.mesh import DEVICES


@pytest.mark.long
def test_on_virtual_devices() -> None:
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


LORA = LoraConfig(r=16, targets=expand_targets(["attention"]))
KERNELS: dict[str, Any] = {"attention": "cudnn", "experts": "mosaic"}


def step(model: str, quantize: str | None = None, **implementations: Any) -> Workload:
    return Workload(PRESETS[model], LORA, 1, 2048, "bfloat16", quantize=quantize, **implementations)


@pytest.mark.parametrize(
    ("devices", "batch_size", "data"), [(1, 4, 1), (8, 8, 8), (8, 4, 4), (8, 3, 1), (6, 4, 2), (2, 3, 1)]
)
def test_auto_takes_as_many_devices_as_can_share_the_batch(devices: int, batch_size: int, data: int) -> None:
    choice, why = choose_mesh(step("qwen3-30b-a3b"), batch_size, Devices(devices, devices, None))
    assert choice.mesh == MeshShape(data=data)
    assert choice.work.batch_size == batch_size // data
    assert "every device holds the model" in why
    idle = devices - data
    assert (f"{idle} devices stay idle" in why) == (idle > 1) and ("; 1 device stays idle" in why) == (idle == 1)


@pytest.mark.parametrize(
    ("work", "devices", "gib", "mesh", "says"),
    [
        (step("qwen3-30b-a3b", **KERNELS), 8, 75, "data=8", "every device holds the model"),
        (step("qwen3-30b-a3b"), 8, 22, "data=2,expert=4", "share the experts; a device then needs .*data=8 needs"),
        (step("qwen3-235b-a22b", **KERNELS), 16, 76, "data=2,expert=8", "the devices of a node share the experts"),
        (step("qwen3-235b-a22b", "nf4"), 16, 22, "fsdp=16", "share the layers' weights; .*expert=8 needs"),
        (step("qwen3-235b-a22b"), 16, 37, "fsdp=8,expert=2", "no mesh holds the step by forecast .data=16 needs"),
    ],
)
def test_auto_shares_what_no_device_holds(work: Workload, devices: int, gib: float, mesh: str, says: str) -> None:
    choice, why = choose_mesh(work, devices, Devices(devices, 8, int(gib * 2**30)))
    assert str(choice.mesh) == mesh and re.search(says, why) and "\n" not in why, why
    assert choice.fits == ("no mesh" not in why) == (choice.forecast.total <= gib * 2**30)
    assert choice.forecast == training_forecast(choice.work)


@pytest.mark.parametrize(
    ("gib", "prompts", "mesh"),
    [(80, 8, "data=8"), (80, 1, "data=1"), (20, 8, "data=2,expert=4"), (20, 1, "data=2,expert=4")],
)
def test_auto_where_a_model_is_not_trained(gib: int, prompts: int, mesh: str) -> None:
    """Forecasts of the weights and the cache alone decide; a few prompts share a model that no device holds."""
    config = PRESETS["qwen3-30b-a3b"]
    checkpoint: Any = SimpleNamespace(quantization=None, dtypes={"embed_tokens": np.dtype("bfloat16")})
    opened = lambda: (config, checkpoint)
    devices = Devices(8, 8, gib * 2**30)
    found, (why,) = inference_mesh("auto", config, opened, Inputs(prompts, 1024, more=True), devices)
    assert str(found) == mesh and f"--mesh auto picks {mesh} of 8 devices" in why
    assert inference_mesh(None, config, opened, Inputs(prompts, 1024)) == (ONE_DEVICE, [])
    with pytest.raises(UserError, match="mesh: data=9 needs 9 devices, found 8"):
        inference_mesh("data=9", config, opened, Inputs(prompts, 1024), devices)


def test_auto_splits_only_what_can_be_split() -> None:
    """Experts over a divisor of their number that divides the batch; nothing over more devices than sequences."""
    work = step("qwen3-235b-a22b")
    work = replace(work, config=work.config.replace(num_experts=96))
    assert choose_mesh(work, 12, Devices(10, 10, 2**38))[0].mesh.expert == 2
    choice, why = choose_mesh(work, 1, Devices(8, 8, 2**36))
    assert choice.mesh == MeshShape() and not choice.fits and "7 devices stay idle" in why


def test_ranges_of_rows_are_cut_into_pieces() -> None:
    """What GPUs copy one piece a block: the pieces of a range follow each other, cover it, and are nearly equal."""
    starts, sizes = np.array([5, 1205, 1208, 70000]), np.array([1200, 3, 0, 512 * 9])
    pieces = in_pieces(jnp.asarray(starts), jnp.asarray(sizes))
    found = zip(*(np.asarray(each).reshape(4, -1) for each in pieces), strict=True)
    for start, size, (at, each) in zip(starts, sizes, found, strict=True):
        np.testing.assert_array_equal(at, start + np.cumsum(each) - each)
        assert each.sum() == size and each.max() - each.min() <= 1


def test_weights_are_gathered_by_copy_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between GPUs of one process, unless the user has said otherwise; XLA has the option, whatever the device."""
    chosen, shared = {copy_engines.SYMMETRIC: True}, MeshShape(fsdp=2, expert=2)
    monkeypatch.setenv(copy_engines.POLICY, "")
    monkeypatch.delenv(copy_engines.POLICY)
    assert copy_engines.is_known()
    monkeypatch.setenv("XLA_FLAGS", "")
    assert copy_engines.compiler_options(shared) == {}  # CPUs
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert copy_engines.compiler_options(MeshShape(data=2, context=2)) == {}
    assert copy_engines.POLICY not in os.environ
    assert copy_engines.compiler_options(shared) == chosen
    assert os.environ[copy_engines.POLICY] == "2"
    monkeypatch.setenv(copy_engines.POLICY, "0")
    assert copy_engines.compiler_options(shared) == chosen
    assert os.environ[copy_engines.POLICY] == "0"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert copy_engines.compiler_options(shared) == {}
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", f"--{copy_engines.SYMMETRIC}=false")
    assert copy_engines.compiler_options(shared) == {}


@pytest.mark.parametrize(("devices", "gathers"), [(2, True), (5, True), (6, False), (8, False)])
def test_tokens_are_gathered_where_that_sends_less(devices: int, gathers: bool) -> None:
    assert gathering_sends_less(devices, k=8) == gathers
