"""The files of examples/cluster, started here with as many processes on the CPU: they train what one process trains.

`tests/test_cluster_files.py` checks their fields and flags.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from jaxmoe.train.__main__ import main as train
from tests.conftest import ROOT
from tests.mesh.test_several_processes import make_inputs
from tests.test_cluster_files import SRUN, scripts
from tests.tolerances import bound

pytestmark = pytest.mark.wide

SHORT = ["--seq-length", "64", "--max-steps", "2", "--no-tensorboard"]  # the files ask for 4096 tokens


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with model, records, and the run of one process."""
    folder = tmp_path_factory.mktemp("cluster")
    make_inputs(folder)
    given = ["--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--output", str(folder / "one")]
    given += ["--lora-targets", "attention,experts", "--batch-size", "16"]
    assert train([*given, *SHORT]) == 0
    return folder


def losses(run: pathlib.Path) -> np.ndarray:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.asarray([[row["step"], row["loss"], row["grad_norm"]] for row in rows])


@pytest.mark.parametrize("name", ["slurm.sbatch", "jobset.yaml", "skypilot.yaml"])
def test_the_processes_train_together(name: str, inputs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    script, environments = scripts(port)[name]
    python = f'#!/bin/bash\nexec {sys.executable} "$@" {" ".join(SHORT)}\n'
    for command, text in {"srun": SRUN, "python": python}.items():
        (tmp_path / command).write_text(text)
        (tmp_path / command).chmod(0o755)
    places = {"MODEL": inputs / "model", "DATA": inputs / "data.jsonl", "OUTPUT": inputs / name}
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    base = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    base |= {"XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1"}
    paths = {variable: str(path) for variable, path in places.items()}
    with (tmp_path / "log").open("w") as log:
        begun = [
            subprocess.Popen(["bash", "-c", script], env=base | each | paths, cwd=tmp_path, stdout=log, stderr=log)
            for each in environments
        ]
        codes = [each.wait(timeout=600) for each in begun]
    printed = (tmp_path / "log").read_text()
    assert codes == [0] * len(begun), printed[-3000:]
    assert "--mesh auto picks data=2" in printed
    assert (inputs / name / "adapter_model.safetensors").is_file()
    np.testing.assert_allclose(losses(inputs / name), losses(inputs / "one"), rtol=bound("mesh_fp32"))
