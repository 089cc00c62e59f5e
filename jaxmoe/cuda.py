"""What NVIDIA's driver says about the GPU that JAX will use, without starting JAX; standard library only."""

from __future__ import annotations

import ctypes
import subprocess
from typing import Any

from jaxmoe.errors import UserError

GIB = 2**30
# What a process holds of a GPU besides JAX's pool: CUDA's context, the code of kernels and libraries, CUDA graphs.
# Measured by benchmarks.train_step on an H200: 633 MiB.
OUTSIDE_POOL = 650 * 2**20


def pool_share(limit: float, total: int) -> float:
    """The share of a GPU's `total` bytes that JAX's pool may take so that the process holds at most `limit` GiB.

    Raises:
        UserError: a limit that leaves nothing for the pool.
    """
    pool = min(limit * GIB, total) - OUTSIDE_POOL
    if pool <= 0:
        least = OUTSIDE_POOL / GIB
        raise UserError(f"memory_limit: expected more than the {least:.2g} GiB that CUDA takes, found {limit:g}")
    return pool / total


def total_bytes() -> int | None:
    """The memory of the first visible GPU; None without an NVIDIA driver or a GPU."""
    found = _first_gpu()
    total = ctypes.c_size_t()
    if found is None or found[0].cuDeviceTotalMem_v2(ctypes.byref(total), found[1]):
        return None
    return total.value


def used_bytes() -> int | None:
    """What all processes together use of that GPU's memory, as nvidia-smi counts it; None if it cannot be asked."""
    found = _first_gpu()
    bus = ctypes.create_string_buffer(32)
    if found is None or found[0].cuDeviceGetPCIBusId(bus, len(bus), found[1]):
        return None
    query = ["nvidia-smi", "-i", bus.value.decode(), "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
        return int(done.stdout.strip()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _first_gpu() -> tuple[Any, ctypes.c_int] | None:
    """(the driver's library, the device that CUDA_VISIBLE_DEVICES puts first)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    return driver, device
