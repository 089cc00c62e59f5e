"""What each of several real processes reads of a model, and the memory that it takes: little more than its share.

The model has as many layers as Qwen3-30B-A3B, since a process holds a few layers beside its share while it reads.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from convert.hf2jax import hf2jax
from peers.make_checkpoint import TINY, make_checkpoint
from tests.conftest import ROOT

pytestmark = pytest.mark.wide

SMALL = TINY.replace(
    hidden_size=128,
    num_hidden_layers=48,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    moe_intermediate_size=64,
    dtype="bfloat16",
)
LARGE = SMALL.replace(hidden_size=1024, moe_intermediate_size=256)
MOST = 1.1
PROGRAMS = 48 * 2**20  # bytes of programs and threads that the small model does not need


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    base = tmp_path_factory.mktemp("memory")
    for name, config in (("small", SMALL), ("large", LARGE)):
        make_checkpoint(base / f"{name} HF", config, dtype="bfloat16")
        hf2jax(base / f"{name} HF", base / f"{name} converted")
    return base


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("form", "mesh", "count"), [("HF", "fsdp=2", 2), ("HF", "expert=4", 4), ("converted", "expert=8", 8)]
)
def test_a_process_takes_its_share(form: str, mesh: str, count: int, folders: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag)
    command = [
        sys.executable,
        "-m",
        "tests.mesh.memory",
        *(str(folders / f"{size} {form}") for size in ("small", "large")),
    ]
    started = [
        subprocess.Popen(
            [*command, mesh, str(index), str(count), str(port)],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    printed = [each.communicate(timeout=900)[0] for each in started]
    assert [each.returncode for each in started] == [0] * count
    found = [json.loads(next(line for line in text.splitlines() if line.startswith("{"))) for text in printed]
    assert len({each["digest"] for each in found}) == 1
    for each in found:
        print(form, mesh, {name: f"{each[name] / 2**20:.0f} MiB" for name in ("share", "read", "before", "peak")})
        assert each["read"] <= MOST * each["share"]
        assert each["peak"] - each["before"] <= MOST * each["share"] + PROGRAMS
