"""Several GPUs: what this machine has, and which mesh of one that can be rented holds a training step, by forecast."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxmoe.doctor.cards import CARDS, Card
from jaxmoe.memory import ROOM, Forecast, Workload, format_bytes
from jaxmoe.mesh_choice import ON_A_MESH, Devices, choose_mesh

MODELS = ("qwen3-30b-a3b", "qwen3-235b-a22b")  # presets, if no model is named
PER_NODE = 8
_OLDER = {card.name[:5]: card for card in CARDS}
NODE_CARDS = (
    _OLDER["24 GB"],
    _OLDER["80 GB"],
    Card("141 GB (H200)", 139.8, {"attention": "cudnn", "experts": "mosaic"}),
)
_NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
# Before this version NCCL may lose messages on ARM and then hangs without an error (NVIDIA's release notes of 2.29.3).
_NCCL_ON_ARM = (2, 29, 3)
_PARTS_SHOWN = 0.02  # of the forecast; smaller parts are only in the JSON


@dataclass(frozen=True)
class Fit:
    """What a device of some machines holds of a training step: the mesh that `--mesh auto` picks there, the
    recomputation policy, the forecast, the bytes that it may fill, and whether it does."""

    machines: str
    devices: int
    weights: str
    mesh: str
    remat: str
    forecast: Forecast
    room: int
    fits: bool

    def lines(self) -> list[str]:
        """The fit as two lines: the verdict, and the parts of the forecast."""
        word = "fits" if self.fits else "DOES NOT FIT"
        total, room = format_bytes(self.forecast.total), format_bytes(self.room)
        parts = sorted(self.forecast.parts, key=lambda part: -part.bytes)
        shown = [part for part in parts if part.bytes >= _PARTS_SHOWN * self.forecast.total]
        return [
            f"{self.machines:<24} {self.weights:<10} {word} with {self.mesh} and {self.remat}: {total} of {room}",
            "    " + "; ".join(f"{part.name} {format_bytes(part.bytes)}" for part in shown),
        ]

    def to_json(self) -> dict[str, Any]:
        """The fit as JSON holds it, with all parts of the forecast."""
        parts = [{"name": part.name, "bytes": part.bytes, "exact": part.exact} for part in self.forecast.parts]
        fields = {name: value for name, value in vars(self).items() if name != "forecast"}
        return fields | {"total": self.forecast.total, "parts": parts}


def fits(work: Workload, forms: Mapping[str, str | None]) -> Iterator[Fit]:
    """What one node of eight cards, and two such nodes, hold of a step like `work`, whose `batch_size` counts the
    sequences of each device; `forms`: what weights are called -> how they are held."""
    for card in NODE_CARDS:
        room = int(ROOM * card.pool)
        for nodes in (1, 2):
            count = nodes * PER_NODE
            for weights, quantize in forms.items():
                step = replace(work, quantize=quantize, **card.implementations)
                choice, _ = choose_mesh(step, count * work.batch_size, Devices(count, PER_NODE, room), ON_A_MESH)
                machines = f"{'2 x ' if nodes == 2 else ''}{PER_NODE} x {card.name}"
                yield Fit(
                    machines,
                    count,
                    weights,
                    str(choice.mesh),
                    choice.work.remat,
                    choice.forecast,
                    room,
                    choice.fits,
                )


def this_machine() -> tuple[dict[str, Any], list[str]]:
    """(the GPUs of this machine, how they are connected and NCCL's version, problems with these)."""
    gpus = [line.strip() for line in _nvidia_smi("--query-gpu=name,memory.total", "--format=csv,noheader").splitlines()]
    links = connections(_nvidia_smi("topo", "-m")) if len(gpus) > 1 else []
    nccl = _nccl_version()
    return {"gpus": gpus, "links": links, "nccl": nccl}, nccl_problems(nccl, platform.machine())


def connections(matrix: str) -> list[str]:
    """How pairs of GPUs are connected, by the text of `nvidia-smi topo -m`: "NVLink" (its cells NV1, NV18, ...), or
    "PCIe (PIX)" and the like; each once, the most frequent first. Empty if the text has no such matrix."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", matrix)
    rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    rows = [row[1:] for row in rows if "X" in row[1:]]  # without the header
    cells = [cell for row in rows for cell in row[: len(rows)] if cell != "X"]
    names = ["NVLink" if re.fullmatch(r"NV\d+", cell) else f"PCIe ({cell})" for cell in cells]
    return sorted(dict.fromkeys(names), key=lambda name: -names.count(name))


def nccl_problems(version: str | None, machine: str) -> list[str]:
    """What is known to go wrong with this version of NCCL on this kind of processor."""
    numbers = tuple(map(int, re.findall(r"\d+", version or "")[:3]))
    if numbers and machine == "aarch64" and numbers < _NCCL_ON_ARM:
        fixed = ".".join(map(str, _NCCL_ON_ARM))
        return [f"NCCL {version} can hang on ARM (Grace): install nvidia-nccl-cu13>={fixed} (or nvidia-nccl-cu12)"]
    return []


def _nccl_version() -> str | None:
    for name in _NCCL:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _nvidia_smi(*arguments: str) -> str:
    """What the command prints; nothing if there is no such command, or it fails."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def machine_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """`this_machine` as lines."""
    gpus, links = found["gpus"], found["links"]
    if not gpus:
        yield "no NVIDIA GPU"
    for name in dict.fromkeys(gpus):
        yield f"{gpus.count(name)} x {name}"
    if len(gpus) > 1:
        yield f"connected by {', '.join(links) or 'an unknown link: nvidia-smi topo -m shows no matrix'}"
        if links and links != ["NVLink"]:
            yield "mesh axes that exchange much (expert, fsdp) are slow over PCIe; data exchanges little"
    yield f"NCCL {found['nccl'] or 'not installed as a package (nvidia-nccl-cu12 or -cu13)'}"
