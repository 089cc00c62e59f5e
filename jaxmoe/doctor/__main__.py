"""The command `python -m jaxmoe.doctor`: prints what the doctor finds, as text or as JSON.

With `--model` it adds a forecast of the memory that training and generation need.
"""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from jaxmoe import memory
from jaxmoe.cli.arguments import ArgumentParser, add_dataclass_arguments, dataclass_from_arguments, run
from jaxmoe.doctor.nodes import machine_lines
from jaxmoe.doctor.report import DoctorConfig, report

DESCRIPTION = "Show this machine's devices, the implementation of each operation, and the memory that a model needs."


def build_parser() -> ArgumentParser:
    """The flags."""
    parser = ArgumentParser(description=DESCRIPTION)
    add_dataclass_arguments(parser, DoctorConfig)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report."""
    options = dataclass_from_arguments(DoctorConfig, build_parser().parse_args(argv))
    found = report(options)
    if not options.json:
        print("\n".join(_lines(found)))
        return 0
    if "forecast" in found:
        for name in ("training", "generation"):
            value = found["forecast"][name]
            found["forecast"][name] = {**asdict(value), "total": value.total}
    if "cards" in found:
        found["cards"] = {model: [asdict(row) for row in rows] for model, (_, rows) in found["cards"].items()}
    if "nodes" in found:
        found["nodes"] = {model: [fit.to_json() for fit in fits] for model, (_, fits) in found["nodes"].items()}
    print(json.dumps(found, indent=2))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    lines = ["Devices"]
    for device in found["devices"]:
        size = "unknown memory" if device["memory"] is None else memory.format_bytes(device["memory"])
        lines.append(f"  {device['platform']}: {device['name']}, {size}")
    lines += [f"  ! {problem}" for problem in found["problems"]]
    lines += ["", "Versions"]
    lines += [f"  {name:<18} {version or 'not installed'}" for name, version in found["versions"].items()]
    if "operations" in found:
        lines += ["", "Operations"]
        lines += [f"  {what:<21} {how:<12} {why}" for what, how, why in found["operations"]]
    for model, (work, rows) in found.get("cards", {}).items():
        lines += [
            "",
            f"LoRA training of {model}, adapters on {len(work.lora.targets)} targets, one card (--memory-limit)",
            "  card, attention + experts there (jax 0.11 or newer), weights, what fits",
        ]
        lines += [f"  {row.text(work)}" for row in rows]
    if "node" in found:
        lines += ["", "Several GPUs", *(f"  {line}" for line in machine_lines(found["node"]))]
    for model, (work, fits) in found.get("nodes", {}).items():
        trained = f"adapters on {len(work.lora.targets)} targets" if work.lora else "all parameters"
        batch = f"{work.batch_size} x {work.seq_length} tokens on each GPU"
        lines += ["", f"Training of {model}, {trained}, {batch}: memory of one GPU"]
        lines += [f"  {line}" for fit in fits for line in fit.lines()]
    if "forecast" not in found:
        if "cards" not in found and "nodes" not in found:
            lines += ["", "To see what fits, name a model: --model qwen3-30b-a3b (needs no download)"]
        return lines
    plan = found["forecast"]
    dtype = f"{plan['dtype']} with weights in {plan['quantize']}" if plan["quantize"] else plan["dtype"]
    pairs = ", in pairs" if plan["loss"] in memory.LOSSES_OVER_PAIRS else ""
    lines += [
        "",
        f"Memory of {plan['model']} in {dtype}, {plan['batch_size']} x {plan['seq_length']} tokens{pairs}",
        f"  {plan['parameters']:,} parameters, {plan['active_parameters']:,} of them active per token, "
        f"{plan['trained_parameters']:,} trained",
    ]
    if plan["stored"] is not None and plan["stored"] != plan["quantize"]:
        lines.append(f"  stored in {plan['stored']}, decoded to {plan['dtype']} while it is read (--dequantize)")
    for name in ("training", "generation"):
        total = plan[name].total
        lines += ["", f"  {name}: {memory.format_bytes(total)}"]
        lines += [
            f"    {part.name:<20} {memory.format_bytes(part.bytes):>9}{'' if part.exact else '  (estimate)'}"
            for part in plan[name].parts
        ]
        lines += [f"    {_verdict(total, device)}" for device in _distinct(found["devices"])]
        if name == "training":
            totals = ", ".join(
                f"{remat} {memory.format_bytes(size)}" for remat, size in plan["training_by_remat"].items()
            )
            lines += [
                f"    for each --remat: {totals}",
                "    --remat auto picks the first policy that leaves 4 % of a GPU's memory, or 10 % of a CPU's, free",
            ]
    return lines


def _verdict(total: int, device: dict[str, Any]) -> str:
    if device["memory"] is None:
        return f"{device['name']}: memory unknown"
    room = device["memory"] - total
    word = "fits" if room >= 0 else "DOES NOT FIT"
    return f"{word} on one {device['name']}: {memory.format_bytes(abs(room))} {'left' if room >= 0 else 'short'}"


def _distinct(all_devices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [device for i, device in enumerate(all_devices) if device not in all_devices[:i]]


if __name__ == "__main__":
    run(main)
