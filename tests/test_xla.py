"""Settings for XLA: the user's flags stay, the cache is in the right folder, and nothing is set on a CPU."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from jaxmoe import cuda
from jaxmoe.cli import xla
from jaxmoe.errors import UserError
from tests.conftest import ROOT

VARIABLES = ("XLA_FLAGS", "JAXMOE_XLA_FLAGS", "JAXMOE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(xla, "GPU_FLAGS", {"xla_gpu_first": ("true", "why"), "xla_gpu_second": ("3", "why")})


def test_a_flag_of_the_user_s_stays():
    assert xla.added_flags("") == ["--xla_gpu_first=true", "--xla_gpu_second=3"]
    assert xla.added_flags("--xla_gpu_first=false --xla_dump_to=/tmp/x") == ["--xla_gpu_second=3"]
    assert xla.added_flags("--xla_gpu_second=3 --xla_gpu_first") == []


def test_where_the_cache_lies(monkeypatch):
    assert xla.cache_folder() == pathlib.Path.home() / ".cache" / "jaxmoe" / "xla"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert xla.cache_folder() == pathlib.Path("/elsewhere/jaxmoe/xla")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/the/user/s")
    assert xla.cache_folder() is None
    monkeypatch.setenv("JAXMOE_COMPILATION_CACHE", "/mine")
    assert xla.cache_folder() == pathlib.Path("/mine")
    monkeypatch.setenv("JAXMOE_COMPILATION_CACHE", "off")
    assert xla.cache_folder() is None


CODE = """
import os
from jaxmoe import cuda
from jaxmoe.cli import xla
from jaxmoe.errors import UserError
xla.GPU_FLAGS.clear()
xla.GPU_FLAGS["xla_gpu_autotune_level"] = "0", "a flag that every XLA knows"
xla.configure()
import jax
print(jax.jit(lambda x: x + 1)(1))
print(os.environ.get("XLA_FLAGS", ""), jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        ({"JAX_PLATFORMS": "cpu"}, "None"),
        ({"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": ""}, "--xla_gpu_autotune_level=0 None"),
        ({"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": "", "JAXMOE_XLA_FLAGS": "off"}, "None"),
    ],
    ids=["cpu asked for", "no GPU found", "off"],
)
def test_without_a_gpu(given, printed):
    """On a CPU no cache is kept; the flags, set before JAX knows its device, do no harm."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=os.environ | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["2", f" {printed}" if printed == "None" else printed]


def test_a_memory_limit_becomes_the_pool_s_share(monkeypatch):
    """The rest of the limit is for what lies outside the pool; a limit above the card's memory is the card's."""
    total = 80 * cuda.GIB
    monkeypatch.setattr(cuda, "total_bytes", lambda: total)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")
    for limit, held in ((22, 22), (100, 80)):
        xla.configure(limit)
        share = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        assert round(share * total) == held * cuda.GIB - cuda.OUTSIDE_POOL
        assert "XLA_CLIENT_MEM_FRACTION" not in os.environ
    with pytest.raises(UserError, match=r"memory_limit: expected more than the .* GiB that CUDA takes, found 0.1"):
        xla.configure(0.1)
    monkeypatch.setattr(cuda, "total_bytes", lambda: None)
    with pytest.raises(UserError, match="memory_limit: only valid with an NVIDIA GPU, found none"):
        xla.configure(22)


def test_the_driver_s_word_on_memory(monkeypatch):
    """The total is the driver's; what is used is nvidia-smi's, of the GPU that CUDA_VISIBLE_DEVICES puts first."""
    asked = []

    class Driver:
        def cuInit(self, flags):
            return 0

        def cuDeviceGet(self, device, index):
            return 0

        def cuDeviceTotalMem_v2(self, total, device):
            total._obj.value = 24 * cuda.GIB
            return 0

        def cuDeviceGetPCIBusId(self, bus, length, device):
            bus.value = b"0000:01:00.0"
            return 0

    def answer(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "1024\n")

    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver())
    monkeypatch.setattr(cuda.subprocess, "run", answer)
    assert (cuda.total_bytes(), cuda.used_bytes()) == (24 * cuda.GIB, cuda.GIB)
    assert asked[0][:3] == ["nvidia-smi", "-i", "0000:01:00.0"]
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)  # no GPU
    assert cuda.total_bytes() is cuda.used_bytes() is None
