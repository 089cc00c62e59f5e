"""Runs a plan: one process per side, one after the other, because a GPU holds one large model at a time."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxmoe.distributed.mesh import MeshShape
from tests.parity.plan import Device, Plan, log

ROOT = pathlib.Path(__file__).resolve().parents[2]
_COMMANDS = {
    "exact": ("tests.parity.exact",),
    "transformers": ("tests.parity.torch_side", "transformers"),
    "torch_ref": ("tests.parity.torch_side", "torch_ref"),
    "jaxmoe": ("tests.parity.jax_side",),
}


class SideFailed(Exception):
    """A side's process ended with an error; its output is on stderr."""


def run(plan: Plan, parallel: int = 1) -> None:
    """Writes the plan and runs every side of it, the oracle first: the others are pinned to its experts.

    `parallel` is how many processes run at the same time; the device needs the memory for them. There is one for each
    of the others; what is left of `parallel` goes to jaxmoe, which compiles the most: its processes share the cases. If
    a case fails on a side, its arrays are missing, so its verdict fails; the other cases continue.

    Raises:
        SideFailed: the oracle failed.
    """
    plan.write()
    first, *others = plan.sides
    run_module(*_COMMANDS[first], plan.folder, device=plan.device)
    with ThreadPoolExecutor(parallel) as pool:
        devices = {"jaxmoe": max(MeshShape.parse(case.mesh).size for case in plan.cases)}
        jobs = [
            pool.submit(
                run_module, *_COMMANDS[side], plan.folder, *names, device=plan.device, devices=devices.get(side, 1)
            )
            for side in others
            for names in _shares(plan, parallel - len(others) + 1 if side == "jaxmoe" else 1)
        ]
    for job in jobs:
        try:
            job.result()
        except SideFailed as error:
            log("run", str(error))


def _shares(plan: Plan, count: int) -> list[list[str]]:
    """The names of the cases, dealt to at most so many processes; one process needs no names."""
    count = min(count, len(plan.cases))
    return [[case.name for case in plan.cases[i::count]] for i in range(count)] if count > 1 else [[]]


def quantize(pairs: Sequence[tuple[str | pathlib.Path, str | pathlib.Path]], dtype: str, device: Device) -> None:
    """Writes each (source, target) checkpoint in bitsandbytes' NF4."""
    place = "cpu" if device == "cpu" else "cuda:0"
    arguments = [word for source, target in pairs for word in (source, target, dtype, place)]
    run_module("tests.parity.torch_side", "quantize", *arguments, device=device)


def run_module(*command: object, device: Device, devices: int = 1) -> None:
    """Runs `python -m ...` from the repository's root; a process on the CPU has so many virtual devices."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if device == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = flags.strip()
    else:
        # Two frameworks may share the GPU. Deterministic kernels and no autotuning, as in `make test-gpu`.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0"
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": flags.strip()}
    words = [str(word) for word in command]
    log("run", " ".join(words))
    if subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, check=False).returncode:
        raise SideFailed(f"{words[0]} failed: {' '.join(words[1:])}")
