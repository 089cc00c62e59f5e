"""`python -m jaxmoe.train --mesh`: the numbers of a run, and resuming on another mesh."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmoe.errors import UserError
from jaxmoe.routing.__main__ import main as routing
from jaxmoe.train.loop import train
from jaxmoe.train.settings import TrainConfig
from peers.make_checkpoint import make_checkpoint
from tests.mesh import trial
from tests.tolerances import bound

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a model and records."""
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder / "model", trial.PLAIN)
    lines = (json.dumps({"prompt": f"{i} + {i % 7} = ", "completion": str(i + i % 7) * (1 + i % 3)}) for i in range(60))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(
    base: pathlib.Path, name: str, mesh: str | None, on_step: Callable[..., None] = lambda _: None, **further: Any
) -> np.ndarray:
    """The numbers of a run's steps: loss, auxiliary loss, gradient norm; continues a run of this name."""
    output = base / name
    settings: dict[str, Any] = {"lora_targets": ("q_proj", "experts"), "lora_r": 2, "learning_rate": 1e-3}
    settings |= {"max_steps": STEPS, "batch_size": 8, "seq_length": 32, "save_every": 2, "log_every": 1}
    settings |= {"tensorboard": False, "resume": output.exists(), "mesh": mesh} | further
    train(TrainConfig(model=base / "model", data=base / "data.jsonl", output=output, **settings), on_step)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = "loss", "aux_loss", "grad_norm", "eval_loss"
    return np.asarray([row.get(name) or 0.0 for row in rows for name in names])


def test_offloading_is_for_one_device(base: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"remat: expected .* on several devices \(data=2\), found offload"):
        run(base, "offloaded", "data=2", remat="offload")


@pytest.mark.parametrize(
    ("meshes", "further"),
    [
        ((trial.ALL_AXES, None), {}),
        pytest.param(("data=2,fsdp=2,context=2", "fsdp=2,expert=2"), {"eval_fraction": 0.2}, marks=pytest.mark.wide),
        pytest.param(("data=8", "data=2", None), {"eval_fraction": 0.2, "save_every": 1}, marks=pytest.mark.wide),
    ],
)
def test_a_run_continues_on_another_mesh(
    meshes: tuple[str | None, ...], further: dict[str, Any], base: pathlib.Path
) -> None:
    class Crash(Exception):
        pass

    def crash(at: int, numbers: dict[str, Any]) -> None:
        if numbers["step"] == at:
            raise Crash

    several, one = f"{meshes}", f"one, {further}"
    *before, last = meshes
    for at, mesh in enumerate(before, 3):
        with pytest.raises(Crash):
            run(base, several, mesh, partial(crash, at), **further)
    found, expected = run(base, several, last, **further), run(base, one, None, **further)
    np.testing.assert_allclose(found, expected, rtol=bound("mesh_fp32"))
    ours, theirs = (load_file(base / name / "adapter_model.safetensors") for name in (several, one))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert np.linalg.norm(ours[name] - array) <= bound("mesh_fp32") * np.linalg.norm(array), name
    ours, theirs = (json.loads((base / name / "train_config.json").read_text()) for name in (several, one))
    assert ours["identity"] == theirs["identity"]


@pytest.mark.wide
@pytest.mark.parametrize("mesh", ["data=2,expert=2", "fsdp=2,context=2"])
def test_the_captured_routing_of_the_base_is_that_of_each_token(mesh: str, base: pathlib.Path) -> None:
    """The penalty on the router's way from the base, whose logits are read for the sequences of each device."""
    if not (base / "captured").exists():
        command = ["capture", "--model", str(base / "model"), "--data", str(base / "data.jsonl"), "--full-logits"]
        routing([*command, "--seq-length", "32", "--out", str(base / "captured")])
    captured: dict[str, Any] = {"routing_base": base / "captured", "routing_penalty": 3.0}
    captured |= {"lora_targets": ("q_proj", "router")}
    one, several = (run(base, f"penalty, {each}", each, **captured) for each in (None, mesh))
    np.testing.assert_allclose(several, one, rtol=bound("mesh_fp32"))
    trained = [load_file(base / f"penalty, {each}" / "adapter_model.safetensors") for each in (mesh, None)]
    for name, array in trained[1].items():
        assert np.linalg.norm(trained[0][name] - array) <= bound("mesh_fp32") * np.linalg.norm(array), name
