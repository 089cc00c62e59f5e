"""What the commands set for XLA before JAX starts: flags that pay on a GPU, and a persistent compilation cache.

`configure()` is called by `python -m jaxmoe.train` and `python -m jaxmoe.generate`; a program of one's own calls it
before JAX runs its first operation. What the user has set stays: a flag in XLA_FLAGS, JAX_COMPILATION_CACHE_DIR.

    JAXMOE_XLA_FLAGS=off            adds no flag
    JAXMOE_COMPILATION_CACHE=off    keeps no compiled program; a path keeps them there
"""

from __future__ import annotations

import os
import pathlib

# flag -> (value, why): measured, the numbers are in docs/log/2026-11.md
GPU_FLAGS: dict[str, tuple[str, str]] = {
    "xla_gpu_enable_dynamic_slice_fusion": (
        "false",
        "a kernel whose result is both used and kept for the backward pass would run twice, once into the kept stack",
    ),
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": (
        "true",
        "a scan would fill the stacks of kept results with zeros before it writes all of them",
    ),
}

CACHE_BYTES = 4 * 2**30  # a training step takes some ten megabytes; the least recently used go first


def added_flags(present: str) -> list[str]:
    """The flags of `GPU_FLAGS` that `present`, the value of XLA_FLAGS, does not set."""
    names = {flag.lstrip("-").split("=")[0] for flag in present.split()}
    return [f"--{name}={value}" for name, (value, _) in GPU_FLAGS.items() if name not in names]


def cache_folder() -> pathlib.Path | None:
    """Where compiled programs are kept: None for nowhere, or where JAX has been told of a folder already."""
    wanted = os.environ.get("JAXMOE_COMPILATION_CACHE", "")
    if wanted == "off" or (not wanted and os.environ.get("JAX_COMPILATION_CACHE_DIR")):
        return None
    if wanted:
        return pathlib.Path(wanted).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "jaxmoe" / "xla"


def configure() -> None:
    """Sets the flags, then, where JAX finds a GPU, the compilation cache; starts JAX's backend.

    On a CPU nothing is kept: a program compiled there may use instructions that another machine of the same home
    folder lacks.
    """
    if os.environ.get("JAXMOE_XLA_FLAGS") != "off" and os.environ.get("JAX_PLATFORMS") != "cpu":
        present = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = " ".join([*present.split(), *added_flags(present)])

    import jax

    folder = cache_folder()
    if folder is None or jax.default_backend() == "cpu":
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    # Every program counts: a run compiles dozens that take a tenth of a second each.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
