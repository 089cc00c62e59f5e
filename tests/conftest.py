"""Set-up for the whole suite: JAX's platform, checked array annotations, the `gpu` marker.

Array annotations (`Float[Array, "B T D"]`) are checked at run time if beartype is installed; pytest's header says
whether they are. Without JAX_PLATFORMS the suite runs on whatever device JAX finds. Tests marked `gpu` are skipped if
that is not a GPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import pytest

from tests.mesh import DEVICES

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKED_PACKAGES = ("jaxmoe", "torch_ref", "convert", "captures")

# No test may use the network: an unintended hub id fails at once instead of downloading.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Both frameworks share a process and a few cores: the threads of tokenizers only add noise and a fork warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Parallel workers share the cores: by default PyTorch starts as many threads as there are cores in each worker.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
# On a CPU nearly all of the suite's time goes to LLVM. Less optimisation reorders no sum. XLA's newer emitters for
# fusions take three times as long as the older ones, which jax 0.10 still has. What one process has compiled, the
# other workers and the commands that tests start find in a folder that lives as long as the session.
COMPILATION_CACHE = None
if os.environ.get("JAX_PLATFORMS") == "cpu":
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    quick += " --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        COMPILATION_CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILATION_CACHE.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# Two frameworks share the GPU: preallocating most of its memory would leave none for PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
collect_ignore = [] if BITSANDBYTES else ["test_torch_ref_4bit.py"]
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    collect_ignore.append("mesh")  # `tests/test_mesh.py` runs it in a process of its own


def annotated_modules() -> list[str]:
    """The modules with array annotations; to check every call of the others would take most of their tests' time."""
    files = (file for package in CHECKED_PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    annotated = (
        file for file in files if re.search(r"^(from|import) jaxtyping\b", file.read_text(encoding="utf-8"), re.M)
    )
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in annotated]


ANNOTATIONS_CHECKED = importlib.util.find_spec("beartype") is not None
if ANNOTATIONS_CHECKED:
    import jaxtyping

    import tests.annotations  # noqa: F401 - the hook below names it, but only imports the part before the dot

    # This must come before the first import of a checked module.
    jaxtyping.install_import_hook(annotated_modules(), "tests.annotations.checked")


@functools.cache
def backend() -> str:
    """The platform of JAX's default device: cpu or gpu."""
    import jax

    return jax.default_backend()


def pytest_report_header() -> list[str]:
    import jax

    checked = "on (beartype)" if ANNOTATIONS_CHECKED else "off (beartype is not installed)"
    return [
        f"jax {jax.__version__} on {', '.join(str(device) for device in jax.devices())}",
        f"run-time check of array annotations: {checked}",
        f"4-bit tests of torch_ref: {'on' if BITSANDBYTES else 'off (bitsandbytes is not installed)'}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and backend() != "gpu":
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU, JAX runs on {backend()}"))
    # A long test that starts last would keep one worker busy while the others are done.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiles what captures, effects and generation run with less optimisation, as `tests.parity` does.

    Nearly all of their tests' time is LLVM's. Both sides of every comparison are compiled alike."""
    import jax

    from jaxmoe.generate import engine
    from jaxmoe.routing import capture, effects
    from tests.parity import COMPILER_OPTIONS

    programs = [
        (capture, "capture_step", "program"),
        (effects, "_run", ("config", "options")),
        (effects, "_outcome", ("placement",)),
        (engine, "_prefill", "program"),
        (engine, "_decode", "program"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, static in programs:
            plain = getattr(module, name).__wrapped__
            patch.setattr(module, name, jax.jit(plain, static_argnames=static, compiler_options=COMPILER_OPTIONS))
        yield


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One temporary folder for the whole session, for files that are expensive to make and only read."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m MODULE ARGUMENTS...` from the repository's root, as a user would, and returns the result."""

    def call(module: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)

    return call
