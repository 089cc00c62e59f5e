"""Loading a checkpoint from memory-backed disk to the device, beside transformers: `python -m benchmarks.load`.

Writes a random checkpoint of a published shape in HF form, or uses a given folder, and loads it once per side, each
side in its own process. The time runs from the call until the weights are on the device, without imports. Host
memory is the peak anonymous memory of the process; the mapped checkpoint is page cache and does not count. With
`--converted` jaxmoe also loads the converted folder.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

from benchmarks import shapes
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides import anonymous_bytes, installed
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.memory import format_bytes

SIDES = ("transformers", "jaxmoe", "jaxmoe, converted", "jaxmoe, converted, unverified")


def measure(side: str, folder: pathlib.Path) -> dict[str, Any]:
    """Loads `folder` in this process: seconds, and bytes on the device."""
    if side == "transformers":
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=device)  # CUDA starts before the clock does
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=device, use_safetensors=True, trust_remote_code=False
        )
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        size = sum(p.numel() * p.element_size() for p in model.parameters())
    else:
        import jax

        from convert.hf2jax import read_hf
        from jaxmoe.store.converted import read_converted
        from jaxmoe.store.loading import load_stacks

        jax.block_until_ready(jax.numpy.zeros(1))
        start = time.perf_counter()
        source = read_hf(folder) if side == "jaxmoe" else read_converted(folder, verify="unverified" not in side)
        params = load_stacks(source.config, source)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
        size = sum(array.nbytes for array in params.values())
    return {"seconds": seconds, "bytes": size}


def main() -> None:
    """Prints the table; with --side one measurement as JSON."""
    parser = ArgumentParser(description="Loading a checkpoint to the device beside transformers.")
    shapes.add_arguments(parser)
    parser.add_argument("--model", type=pathlib.Path, metavar="DIR", help="load this folder instead of a random one")
    scratch_help = "where the checkpoint is written (default: /dev/shm)"
    parser.add_argument(
        "--scratch", type=pathlib.Path, default=pathlib.Path("/dev/shm"), metavar="DIR", help=scratch_help
    )
    parser.add_argument("--converted", action="store_true", help="also convert the folder and load the result")
    sides = "sides to measure (default: transformers;jaxmoe)"
    parser.add_argument("--sides", default="transformers;jaxmoe", metavar="NAME;...", help=sides)
    parser.add_argument("--side", choices=SIDES, help="measure only this side, in this process, and print JSON")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.model)))
        return
    scratch = args.scratch / f"benchmark-load-{os.getpid()}"
    try:
        _compare(args, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compare(args: argparse.Namespace, scratch: pathlib.Path) -> None:
    folder = args.model
    if folder is None:
        config = shapes.config_of(args)
        folder = scratch / "hf"
        start = time.perf_counter()
        write_checkpoint(folder, config)
        print(f"{folder}: {config.num_hidden_layers} layers written in {time.perf_counter() - start:.1f} s", flush=True)
    sides = args.sides.split(";")
    if args.converted:
        from convert.hf2jax import read_hf
        from jaxmoe.store.converted import write_converted

        source = read_hf(folder)
        start = time.perf_counter()
        write_converted(scratch / "converted", source, {"config.json": folder / "config.json"})
        print(f"converted in {time.perf_counter() - start:.1f} s", flush=True)
        sides += ["jaxmoe, converted", "jaxmoe, converted, unverified"]
    print(f"{'':32}{'seconds':>9}{'GB/s':>8}{'host memory':>14}", flush=True)
    record: dict[str, Any] = {}
    for side in sides:
        where = scratch / "converted" if "converted" in side else folder
        if not installed(side):
            print(f"{side:32} not installed", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks.load", "--side", side, "--model", str(where)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{side}: {error.strip()[-2000:]}")
        record[side] = found = {**json.loads(out.splitlines()[-1]), "peak": peak}
        print(
            f"{side:32}{found['seconds']:9.1f}{found['bytes'] / found['seconds'] / 1e9:8.2f}{format_bytes(peak):>14}",
            flush=True,
        )
    shapes.write_json(args.json, record)


if __name__ == "__main__":
    run(main)
