"""Weights of layers are gathered by the GPUs' copy engines, which leave the multiprocessors to the kernels beside them.

NCCL 2.28 and newer gather this way between GPUs of one machine, if the buffers are registered as symmetric memory and
its policy says so. On two H200s a step with `fsdp=2` takes 9 % less time (docs/scaling.md).
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import jax

from jaxmoe.distributed.mesh import MeshShape

SYMMETRIC = "xla_gpu_experimental_enable_nccl_symmetric_buffers"
POLICY = "NCCL_CTA_POLICY"
_ZERO = "2"  # NCCL_CTA_POLICY_ZERO: no thread blocks where NCCL can do without


def compiler_options(mesh: MeshShape) -> dict[str, Any]:
    """XLA's options for a program in which the GPUs of this process gather weights; for any other program none.

    NCCL reads its policy from the environment before the first exchange, so it is set there. What the user has set, in
    XLA_FLAGS or there, stays. Several processes are left out: registered memory has not been tried between them.
    """
    if mesh.fsdp == 1 or jax.default_backend() != "gpu" or jax.process_count() > 1:
        return {}
    if SYMMETRIC in os.environ.get("XLA_FLAGS", "") or not is_known():
        return {}
    os.environ.setdefault(POLICY, _ZERO)
    return {SYMMETRIC: True}


@cache
def is_known() -> bool:
    """Whether this version of XLA has the option, which is experimental."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={SYMMETRIC: True})
    except jax.errors.JaxRuntimeError:
        return False
    return True
