"""Settings for XLA: the user's flags stay, the cache is in the right folder, and nothing is set on a CPU."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from jaxmoe.cli import xla
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
from jaxmoe.cli import xla
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
