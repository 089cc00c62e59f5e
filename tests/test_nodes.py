"""`python -m jaxmoe.doctor --mesh`: the links of GPUs, versions of NCCL, and what fits on nodes of eight."""

from __future__ import annotations

import json

import pytest

from jaxmoe.doctor import nodes
from jaxmoe.doctor.__main__ import main
from tests.conftest import ROOT

# Cells of `nvidia-smi topo -m`; the header is underlined on a terminal.
NVLINK = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47,96-143\t0\t\tN/A
GPU1\tNV18\t X \tNODE\t0-47,96-143\t0\t\tN/A
NIC0\tPIX\tNODE\t X

Legend:

  X    = Self
"""
PCIE = """\
\tGPU0\tGPU1\tGPU2\tCPU Affinity
GPU0\t X \tPIX\tSYS\t0-31
GPU1\tPIX\t X \tSYS\t0-31
GPU2\tSYS\tSYS\t X \t32-63
"""


@pytest.mark.parametrize(
    ("matrix", "links"), [(NVLINK, ["NVLink"]), (PCIE, ["PCIe (SYS)", "PCIe (PIX)"]), ("", []), ("no devices", [])]
)
def test_links_are_read_from_the_matrix(matrix: str, links: list[str]) -> None:
    assert nodes.connections(matrix) == links


@pytest.mark.parametrize(
    ("version", "machine", "bad"),
    [
        ("2.28.9", "aarch64", True),
        ("2.29.3", "aarch64", False),
        ("2.30.7", "aarch64", False),
        ("2.28.9", "x86_64", False),
        (None, "aarch64", False),
    ],
)
def test_versions_that_hang_are_named(version: str | None, machine: str, bad: bool) -> None:
    problems = nodes.nccl_problems(version, machine)
    assert bool(problems) == bad and all("2.28.9 can hang" in problem for problem in problems)


def test_what_fits_on_nodes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"--query-gpu=name,memory.total": "NVIDIA A, 81559 MiB\n" * 3, "topo": PCIE}
    monkeypatch.setattr(nodes, "_nvidia_smi", lambda first, *_: said[first])
    assert main(["--mesh", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["node"]["links"] == ["PCIe (SYS)", "PCIe (PIX)"] and len(found["node"]["gpus"]) == 3
    assert found["nodes"].keys() == {"qwen3-30b-a3b", "qwen3-235b-a22b"}
    for fits in found["nodes"].values():
        assert [fit["devices"] for fit in fits] == [8, 8, 8, 16, 16, 16] * 3
        for fit in fits:
            assert fit["total"] == sum(part["bytes"] for part in fit["parts"])
            assert fit["fits"] == (fit["total"] <= fit["room"])
    large = {(fit["machines"], fit["weights"]): fit for fit in found["nodes"]["qwen3-235b-a22b"]}
    assert not large["8 x 24 GB (RTX 4090)", "NF4"]["fits"] and large["2 x 8 x 24 GB (RTX 4090)", "NF4"]["fits"]
    assert large["8 x 141 GB (H200)", "bfloat16"]["mesh"] == "expert=8"
    assert large["8 x 141 GB (H200)", "FP8"]["mesh"] == "data=2,expert=4"


def test_the_table_of_the_page_is_what_is_forecast(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which mesh fits, in docs/scaling.md."""
    monkeypatch.setattr(nodes, "_nvidia_smi", lambda *_: "")
    assert main(["--mesh", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["nodes"]
    rows: dict[str, list[str]] = {}
    for fit in (fit for fits in found.values() for fit in fits):
        size = f"{fit['total'] / 2**30:.0f} GiB"
        cell = f"`{fit['mesh']}`, {size}" if fit["fits"] else f"does not fit ({size})"
        rows.setdefault(fit["machines"].split(" (")[0], []).append(cell)
    page = (ROOT / "docs" / "scaling.md").read_text()
    for machines in ("8 x 24 GB", "2 x 8 x 24 GB", "8 x 80 GB", "8 x 141 GB"):
        assert f"| {machines} | {' | '.join(rows[machines])} |\n" in page


def test_what_fits_in_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(nodes, "_nvidia_smi", lambda *_: "")
    assert main(["--mesh", "--model", "qwen3-30b-a3b", "--train", "full"]) == 0
    text = capsys.readouterr().out
    assert "no NVIDIA GPU" in text and "Training of qwen3-30b-a3b, all parameters, 1 x 2048 tokens on each GPU" in text
    assert "8 x 80 GB (H100)" in text and "NF4" not in text
    main(["--mesh"])
    text = capsys.readouterr().out
    assert "Training of qwen3-235b-a22b" in text and "To see what fits" not in text  # it has just been shown
