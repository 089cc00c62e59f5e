"""A device without memory left: one line that says what would fit, and forecasts that agree with it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from jaxmoe import memory, out_of_memory
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.errors import UserError
from jaxmoe.generate import __main__ as generate
from jaxmoe.memory_advice import advice
from jaxmoe.presets import PRESETS
from jaxmoe.routing import __main__ as routing
from tests.conftest import ROOT

GIB = 2**30
FULL = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1610612736 bytes.\n[tf-allocator-...]")
WORK = memory.Workload(
    PRESETS["qwen3-30b-a3b"],
    LoraConfig(r=16, targets=expand_targets(["attention"])),
    4,
    4096,
    "bfloat16",
    remat="fast",
    attention="cudnn",
    experts="mosaic",
    packed=False,
)


def test_only_xla_s_report_is_explained() -> None:
    line = r"^out of device memory \(1.50 GiB more\): close a window$"
    with pytest.raises(UserError, match=line), out_of_memory.explained(lambda: "close a window"):
        raise FULL
    for other in (RuntimeError("INTERNAL: no such kernel"), ValueError("RESOURCE_EXHAUSTED")):
        with pytest.raises(type(other), match=str(other)), out_of_memory.explained(lambda: "never asked"):
            raise other
    assert out_of_memory.exhausted(RuntimeError("RESOURCE_EXHAUSTED: ")) == "out of device memory"


def test_single_changes_that_fit() -> None:
    """Each change comes with its forecast; one that does not fit is left out."""
    said = advice(WORK, 80 * GIB)
    assert re.search(r"needs \S+ GiB by forecast, 80 GiB are there; use --remat low-memory \(", said)
    for flags in ("--batch-size 1 --accumulation 4", "--seq-length 1024", "--quantize nf4"):
        assert f" or {flags} (" in said
    assert "balanced" not in said
    assert "--quantize" not in advice(replace(WORK, quantize="nf4"), 30 * GIB)


def test_changes_together_where_none_is_enough() -> None:
    said = advice(WORK, 22 * GIB)
    assert "; use --remat offload --batch-size 1 --accumulation 4 --quantize nf4 (" in said
    said = advice(WORK, 17 * GIB)
    assert re.search(r"--quantize nf4 --seq-length \d+ \(", said)
    said = advice(WORK, 8 * GIB)
    assert "; no smaller step fits, the least is --remat offload" in said
    assert "--seq-length 128 (" in said


def test_a_step_that_fits_by_forecast_and_did_not() -> None:
    """What is proposed is smaller than what failed, whatever there is."""
    least = replace(WORK, batch_size=1, seq_length=128, remat="offload", quantize="nf4")
    for available in (None, 10**12):
        assert "use --remat balanced (" in advice(WORK, available)
        assert "the least is this step (" in advice(least, available)


@pytest.mark.parametrize(
    ("main", "arguments", "fails", "says"),
    [
        (
            generate,
            ["--prompt", "x"],
            "generate.__main__._load",
            "use fewer prompts at once, a smaller --max-new-tokens",
        ),
        (
            routing,
            ["capture", "--data", "x", "--out", "y"],
            "routing.commands.capture._capture",
            "use a smaller --batch-size or --seq-length",
        ),
    ],
    ids=["generate", "capture"],
)
def test_commands(main: Any, arguments: list[str], fails: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(f"jaxmoe.{fails}", fail)
    with pytest.raises(UserError, match=rf"^out of device memory \(1.50 GiB more\): {says}"):
        main.main([*arguments, "--model", str(ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib")])
