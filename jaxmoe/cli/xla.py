"""What the commands set for XLA before JAX starts: flags that speed up a GPU, and a persistent compilation cache.

`python -m jaxmoe.train` and `python -m jaxmoe.generate` call `configure()`; your own program should call it before JAX
runs its first operation. It keeps what the user has set: a flag in XLA_FLAGS, or JAX_COMPILATION_CACHE_DIR.

    JAXMOE_XLA_FLAGS=off            adds no flag
    JAXMOE_COMPILATION_CACHE=off    caches no compiled program; a path caches them there
"""

from __future__ import annotations

import os
import pathlib

from jaxmoe import cuda
from jaxmoe.errors import UserError

# flag -> (value, reason); the measurements are in docs/log/2026-11.md
GPU_FLAGS: dict[str, tuple[str, str]] = {
    "xla_gpu_enable_dynamic_slice_fusion": (
        "false",
        "a kernel whose result is used and saved for the backward pass would run twice, once into the saved stack",
    ),
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": (
        "true",
        "a scan would fill the stacks of saved results with zeros before it writes all of them",
    ),
}

CACHE_BYTES = 4 * 2**30  # a training step needs some ten megabytes; the least recently used go first


def added_flags(present: str) -> list[str]:
    """The flags of `GPU_FLAGS` that `present`, the value of XLA_FLAGS, does not set."""
    names = {flag.lstrip("-").split("=")[0] for flag in present.split()}
    return [f"--{name}={value}" for name, (value, _) in GPU_FLAGS.items() if name not in names]


def cache_folder() -> pathlib.Path | None:
    """Where to cache compiled programs; None if caching is off or JAX_COMPILATION_CACHE_DIR already says where."""
    wanted = os.environ.get("JAXMOE_COMPILATION_CACHE", "")
    if wanted == "off" or (not wanted and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return None
    if wanted:
        return pathlib.Path(wanted).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxmoe" / "xla"


def configure(memory_limit: float | None = None) -> None:
    """Sets the flags and, if JAX finds a GPU, the compilation cache; looking for a GPU starts JAX's backend.

    With `memory_limit`, in GiB, the process takes no more of the GPU's memory: JAX's pool takes what CUDA's context,
    libraries and kernels leave of it.

    Programs for a CPU are not cached: they may use instructions that another machine with the same home folder lacks.

    Raises:
        UserError: a limit that the GPU cannot keep, or a limit without an NVIDIA GPU.
    """
    if memory_limit is not None:
        _limit_pool(memory_limit)
    if os.environ.get("JAXMOE_XLA_FLAGS") != "off" and os.environ.get("JAX_PLATFORMS") != "cpu":
        present = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([*present.split(), *added_flags(present)])

    import jax

    folder = cache_folder()
    if folder is None or jax.default_backend() == "cpu":
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    # No program is too small to cache: a run compiles dozens that take a tenth of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _limit_pool(limit: float) -> None:
    """Tells JAX how much of the GPU its pool may take; it listens once, before its first operation."""
    total = cuda.total_bytes()
    if total is None:
        raise UserError("memory_limit: only valid with an NVIDIA GPU, found none")
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)  # the newer name; JAX refuses both
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(cuda.pool_share(limit, total))
