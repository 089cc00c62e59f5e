"""Set-up for the whole suite: JAX's platform, checked array annotations, the `gpu` marker.

Array annotations (`Float[Array, "B T D"]`) are checked at run time where beartype is installed; pytest's header says
whether they are. Without JAX_PLATFORMS the suite runs on whatever device JAX finds, and tests marked `gpu` are skipped
where that is not a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKED_PACKAGES = ("jaxmoe", "torch_ref", "convert", "captures")

# No test may reach the network: a hub id that slips in fails at once instead of downloading.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Both frameworks in one process on a few cores: tokenizers' own threads only add noise and a fork warning.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers side by side share the cores: PyTorch would start as many threads as there are cores in each of them.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
# Two frameworks share the GPU; preallocating most of it would leave PyTorch none.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
collect_ignore = [] if BITSANDBYTES else ["test_torch_ref_4bit.py"]

ANNOTATIONS_CHECKED = importlib.util.find_spec("beartype") is not None
if ANNOTATIONS_CHECKED:
    import jaxtyping

    import tests.annotations  # noqa: F401 - the hook below names it, but imports only what stands before the dot

    # Has to come before the first import of a checked package.
    jaxtyping.install_import_hook(list(CHECKED_PACKAGES), "tests.annotations.checked")


@functools.cache
def backend() -> str:
    """The platform that JAX has chosen: cpu or gpu."""
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
    # Begun last, a long test would keep one worker busy while the others have nothing left.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Compiles what captures, interventions and generation run with less optimisation, as `tests.parity` does: nearly
    all of their tests' time is LLVM's. Both sides of every comparison are compiled alike."""
    import jax

    from jaxmoe.control import interventions
    from jaxmoe.generate import engine as generate
    from jaxmoe.routing import capture
    from tests.parity import COMPILER_OPTIONS

    programs = [
        (capture, "capture_step", ("config", "lora", "top", "predictions")),
        (interventions, "_run", ("config", "lora")),
        (interventions, "_outcome", ()),
        (generate, "_prefill", generate._STATIC),
        (generate, "_decode", generate._STATIC),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, static in programs:
            plain = getattr(module, name).__wrapped__
            patch.setattr(module, name, jax.jit(plain, static_argnames=static, compiler_options=COMPILER_OPTIONS))
        yield


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """One temporary folder for the whole session, for what is expensive to make and only read."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m MODULE ARGUMENTS...` as a user would, from the repository root, and returns its outcome."""

    def call(module: str, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)

    return call
