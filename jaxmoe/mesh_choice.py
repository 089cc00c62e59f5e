"""Which mesh `--mesh auto` means: the one with the least to exchange that holds a step, by forecast.

Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from jaxmoe.distributed.mesh import SEQUENCE_AXES, MeshShape
from jaxmoe.errors import counted
from jaxmoe.memory import Forecast, Remat, Workload, format_bytes, training_forecast

ON_A_MESH: tuple[Remat, ...] = ("fast", "balanced", "low-memory")  # the policies that several devices can use


@dataclass(frozen=True)
class Devices:
    """How many devices there are, how many of them in each node, and how many bytes of one a step may fill (None:
    unknown)."""

    count: int
    per_node: int
    room: int | None


@dataclass(frozen=True)
class Choice:
    """A mesh, the step of one of its devices with the fastest policy that fits, or else the most frugal one, and the
    forecast of that step."""

    mesh: MeshShape
    work: Workload
    forecast: Forecast
    fits: bool


def choose_mesh(
    work: Workload,
    batch_size: int,
    devices: Devices,
    policies: Sequence[Remat] = ON_A_MESH,
    forecast: Callable[[Workload], Forecast] = training_forecast,
) -> tuple[Choice, str]:
    """(the mesh for a step of `batch_size` sequences, which and why in a line).

    `work` is the step of a device, except for its mesh, batch size and policy; `policies`, the fastest first, are those
    that it may use; `forecast` is for training, or for generation. In this order: every device holds the model; the
    devices of a node share the experts; devices share the layers' weights; both. If no mesh holds the step, the choice
    is the one with the smallest forecast.
    """
    tried: list[Choice] = []
    for kind in _kinds(work, batch_size, devices):
        choices = [_step(work, mesh, batch_size, devices, policies, forecast) for mesh in kind]
        if not choices:
            continue
        # The more devices the better, then the less is recomputed, then the less the model is divided.
        divided = lambda each: each.mesh.expert * each.mesh.fsdp
        recomputed = lambda each: policies.index(each.work.remat)
        best = max(choices, key=lambda each: (each.fits, each.mesh.size, -recomputed(each), -divided(each)))
        if best.fits:
            return best, _why(best, tried, batch_size, devices)
        tried.append(min(choices, key=lambda each: each.forecast.total))
    best = min(tried, key=lambda each: each.forecast.total)
    return best, _why(best, tried, batch_size, devices)


def _kinds(work: Workload, batch_size: int, devices: Devices) -> Iterator[list[MeshShape]]:
    """The meshes of each kind, which divide the batch, the devices of a node and the experts evenly."""
    config = work.config
    experts = [n for n in _divisors(devices.per_node) if n > 1 and config.sparse_layers and config.num_experts % n == 0]
    layers = [n for n in _divisors(devices.count) if n > 1]
    both = [(f, e) for f in layers for e in experts]
    for shares in ([(1, 1)], [(1, e) for e in experts], [(f, 1) for f in layers], both):
        meshes = []
        for fsdp, expert in shares:
            rest = devices.count // (fsdp * expert)
            if rest and devices.count % (fsdp * expert) == 0 and batch_size % (fsdp * expert) == 0:
                data = math.gcd(rest, batch_size // (fsdp * expert))
                meshes.append(MeshShape(data=data, fsdp=fsdp, expert=expert))
        yield meshes


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _step(
    work: Workload,
    mesh: MeshShape,
    batch_size: int,
    devices: Devices,
    policies: Sequence[Remat],
    forecast: Callable[[Workload], Forecast],
) -> Choice:
    work = replace(work, mesh=mesh, batch_size=batch_size // mesh.product(SEQUENCE_AXES))
    for policy in policies:
        work = replace(work, remat=policy)
        needed = forecast(work)
        if devices.room is None or needed.total <= devices.room:
            return Choice(mesh, work, needed, True)
    return Choice(mesh, work, needed, False)


_WAYS = {"expert": "the devices of a node share the experts", "fsdp": "devices share the layers' weights"}


def _why(choice: Choice, tried: Sequence[Choice], batch_size: int, devices: Devices) -> str:
    mesh = choice.mesh
    begin = f"--mesh auto picks {mesh} of {counted(devices.count, 'device')}: "
    end = ""
    if mesh.size < devices.count:
        idle = devices.count - mesh.size
        stay = "stays" if idle == 1 else "stay"
        end = f"; {counted(idle, 'device')} {stay} idle: a multiple of {devices.count} sequences would use all"
    if not tried:
        sequences = f"{batch_size // mesh.product(SEQUENCE_AXES)} of {batch_size} sequences"
        return f"{begin}every device holds the model and takes {sequences}{end}"
    assert devices.room is not None
    room = f"{format_bytes(devices.room)} of a device can be used"
    short = ", ".join(f"{each.mesh} needs {format_bytes(each.forecast.total)}" for each in tried)
    if not choice.fits:
        return f"{begin}no mesh holds the step by forecast ({short}; {room}){end}"
    how = ", ".join(way for axis, way in _WAYS.items() if mesh[axis] > 1)
    return f"{begin}{how}; a device then needs {format_bytes(choice.forecast.total)} by forecast ({short}; {room}){end}"
