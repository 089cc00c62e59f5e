"""Sides of a comparison, each measured in its own process."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks import stages

_PACKAGES = {
    "transformers": ("torch",),
    "transformers + PEFT": ("torch", "peft"),
    "transformers + bitsandbytes": ("torch", "bitsandbytes"),
    "Unsloth": ("torch", "unsloth"),
    "bitsandbytes": ("torch", "bitsandbytes"),
}


def installed(side: str) -> bool:
    """Whether the packages of this side are installed."""
    return all(importlib.util.find_spec(name) is not None for name in _PACKAGES.get(side, ()))


def measure_apart(module: str, side: str, case: str, argv: list[str], xla_flags: str = "") -> dict[str, Any]:
    """Runs `python -m MODULE` for one side and case.

    Returns its numbers, or {"failed": the last error that it wrote}.
    """
    command = [sys.executable, "-m", module, *argv, "--side", side, "--case", case]
    # JAX uses three quarters of the memory by default; the longest sequences need more.
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {xla_flags}".strip()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line]
        return {"failed": (errors or lines or ["no message"])[-1].strip()[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def stages_apart(module: str, case: str, argv: list[str]) -> list[str]:
    """The lines of a table of jaxmoe's time by stage, from a process that uses no command buffers.

    The profiler cannot name kernels inside a command buffer. Without them the step is a little slower, so the speed in
    the table of sides comes from another run.
    """
    found = measure_apart(module, "jaxmoe", case, [*argv, "--stages"], "--xla_gpu_enable_command_buffer=")
    if "failed" in found:
        return ["", f"stages: {found['failed']}"]
    lines = ["", f"without command buffers: {found['seconds'] * 1e3:.1f} ms"]
    lines += stages.table(found["profile"], found["seconds"] * 1e3)
    lines += ["", "slowest instructions: ms per step, launches per step"]
    for instruction, ms, count, path in found["profile"]["slowest"]:
        lines.append(f"{ms:9.2f}{count:6}  {instruction}  {path[-90:]}")
    return lines


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process in bytes, 0 after it has ended (Linux).

    Pages of mapped files belong to the page cache, which the kernel takes back if it needs memory; they do not count.
    """
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
