"""The device time of a compiled step by stage, from a profiler's trace.

Each kernel in the trace names the HLO instruction that it runs. The compiled program names the `jax.named_scope` of
each instruction. A fusion counts under the scope of its root. What GPUs exchange is a stage of its own; it may run
while they compute. Of several GPUs, the first one counts.
"""

from __future__ import annotations

import gzip
import json
import pathlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax

# Named scopes of the model and the step; the innermost one counts. `attention` without `dot_product_attention` means
# projections, norms and rotary embedding. `experts` without a part means what XLA fused across its parts.
STAGES = (
    "dot_product_attention",
    "attention",
    "router",
    "permute",
    "gate_up",
    "swiglu",
    "down",
    "combine",
    "weight_gradients",
    "nf4_decode",
    "fp8_decode",
    "experts",
    "dense_mlp",
    "head",
    "optimizer",
)
PASSES = ("forward", "recomputed", "backward")
OTHER, EXCHANGE = "other", "exchange"

ByStage = dict[tuple[str, str], float]

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name=\"([^\"]*)\"", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z_]+")
_EXCHANGES = re.compile("nccl|RaggedAllToAll|MultiGpuBarrier")  # in names of kernels, NCCL's and XLA's own


class Kernel(NamedTuple):
    """A kernel's HLO instruction, its start and duration in microseconds, and whether GPUs exchange data in it."""

    instruction: str
    start: float
    duration: float
    exchanges: bool = False


def scopes(hlo: str) -> dict[str, str]:
    """HLO instruction -> its path of scopes and primitives, from a compiled program's text."""
    return dict(_INSTRUCTION.findall(hlo))


def stage_of(path: str) -> tuple[str, str]:
    """(stage, pass) of an instruction's path, such as `jit(f)/transpose(jvp(while))/body/attention/dot_general`."""
    stage = OTHER
    for part in path.split("/"):
        for word in _WORD.findall(part):
            if word in STAGES:
                stage = word
    if "rematted_computation" in path:
        return stage, "recomputed"
    return stage, "backward" if "transpose(" in path else "forward"


def kernels(trace: Mapping[str, Any]) -> list[Kernel]:
    """All kernels on the first device."""
    devices = {
        event["args"]["name"]: event["pid"]
        for event in trace["traceEvents"]
        if event.get("name") == "process_name" and "/device:" in event["args"]["name"]
    }
    first = devices[min(devices)] if devices else None
    found = []
    for event in trace["traceEvents"]:
        # Only events of streams have a correlation id; the lines derived from them would count twice.
        if event.get("ph") == "X" and event["pid"] == first and "correlation_id" in event.get("args", {}):
            instruction = event["args"].get("hlo_op", event["name"])
            exchanges = _EXCHANGES.search(event["name"]) is not None
            found.append(Kernel(instruction, float(event["ts"]), float(event["dur"]), exchanges))
    return found


def by_stage(events: Iterable[Kernel], paths: Mapping[str, str], steps: int) -> ByStage:
    """(stage, pass) -> milliseconds of device time per step."""
    total: ByStage = defaultdict(float)
    for event in events:
        stage, which = stage_of(paths.get(event.instruction, ""))
        total[EXCHANGE if event.exchanges else stage, which] += event.duration / 1e3 / steps
    return dict(total)


def busy(events: Iterable[Kernel]) -> float:
    """Milliseconds in which the device ran a kernel; overlapping streams count once."""
    total, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.start + event.duration - max(event.start, end))
        end = max(end, event.start + event.duration)
    return total / 1e3


def only_exchanging(events: Collection[Kernel]) -> float:
    """Milliseconds in which the device exchanged data and did nothing else."""
    return busy(events) - busy([event for event in events if not event.exchanges])


def slowest(
    events: Iterable[Kernel], paths: Mapping[str, str], steps: int, count: int
) -> list[tuple[str, float, int, str]]:
    """(HLO instruction, milliseconds per step, launches per step, path) of the `count` slowest instructions."""
    total: dict[str, list[float]] = defaultdict(list)
    for event in events:
        total[event.instruction].append(event.duration / 1e3)
    ranked = sorted(total.items(), key=lambda item: -sum(item[1]))[:count]
    return [(name, sum(times) / steps, len(times) // steps, paths.get(name, "")) for name, times in ranked]


def profile(run: Callable[[], Any], compiled: Any, steps: int = 3, keep: pathlib.Path | None = None) -> dict[str, Any]:
    """Runs `run`, a warmed-up call of `compiled`, `steps` times under the profiler.

    Returns "stages" [[stage, pass, milliseconds per step]], "busy" and "exchanging" (milliseconds per step in which a
    kernel ran, and in which only an exchange did) and "slowest". The trace is also stored in `keep`, for Perfetto.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                result = run()
            jax.block_until_ready(result)
        (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        content = file.read_bytes()
    if keep is not None:
        keep.write_bytes(content)
    events, paths = kernels(json.loads(gzip.decompress(content))), scopes(compiled.as_text())
    return {
        "stages": [[*key, value] for key, value in by_stage(events, paths, steps).items()],
        "busy": busy(events) / steps,
        "exchanging": only_exchanging(events) / steps,
        "slowest": slowest(events, paths, steps, 15),
    }


def table(found: Mapping[str, Any], step: float) -> list[str]:
    """The lines of a table by stage; `step` is the time of a step in milliseconds, without the profiler."""
    cells = {(stage, which): value for stage, which, value in found["stages"]}
    lines = [f"{'stage':<24}" + "".join(f"{which:>12}" for which in PASSES) + f"{'ms':>10}{'share':>8}"]
    for stage in (*STAGES, EXCHANGE, OTHER):
        row = [cells.get((stage, which), 0.0) for which in PASSES]
        if sum(row) > 0:
            share = sum(row) / step
            lines.append(f"{stage:<24}" + "".join(f"{v:12.2f}" for v in row) + f"{sum(row):10.2f}{share:8.1%}")
    if alone := found.get("exchanging"):
        lines.append(f"{'exchange while nothing else runs':<60}{alone:10.2f}{alone / step:8.1%}")
    idle = step - found["busy"]
    lines.append(f"{'no kernel running':<60}{idle:10.2f}{idle / step:8.1%}")
    return lines
