"""The versions and the device that a side ran on, written beside its arrays."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import time
from typing import Any

from tests.parity.plan import Device, Plan

_PACKAGES = ("numpy", "torch", "transformers", "peft", "bitsandbytes", "jax", "jaxlib", "flax")
_START = time.monotonic()


def torch_device(device: Device) -> str:
    """torch's name for the plan's device; on a GPU, sets float32 products to full precision."""
    import torch

    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("device: expected a GPU, torch finds none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return "cuda:0"


def write_environment(plan: Plan, side: str) -> None:
    """Writes `SIDE.json`: versions of the installed and loaded packages, the device's name, seconds since the start."""
    content: dict[str, Any] = {
        "python": platform.python_version(),
        "device": _device_name(plan.device),
        "seconds": round(time.monotonic() - _START, 1),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES if name in sys.modules},
    }
    (plan.folder / f"{side}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _device_name(device: Device) -> str:
    if device == "cpu":
        return f"CPU, {platform.machine()}"
    if "torch" in sys.modules:
        return sys.modules["torch"].cuda.get_device_name()
    return sys.modules["jax"].devices()[0].device_kind
