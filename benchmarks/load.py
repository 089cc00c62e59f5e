"""Loading a checkpoint from memory-backed disk to the device, beside transformers: `python -m benchmarks.load`.

Writes a random checkpoint of a published shape in HF form, or uses a given folder, and loads it once per side, each
side in its own process. The time runs from the call until the weights are on the device, without imports. Host
memory is the peak anonymous memory of the process; the mapped checkpoint is page cache and does not count. With
`--converted` jaxmoe also loads the converted folder.

With `--quantize nf4` every side ends with weights in NF4. jaxmoe forms the digest of the weights, as training does;
its stages are printed below the table. "reading" copies the files into memory and does nothing else: nothing that
reads them can be faster. transformers with bitsandbytes quantises projections only; its experts stay in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks import shapes
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides import anonymous_bytes, installed
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.memory import format_bytes

PLAIN = ("transformers", "jaxmoe", "jaxmoe, converted", "jaxmoe, converted, unverified")
NF4 = ("reading", "transformers + bitsandbytes", "jaxmoe, NF4", "jaxmoe, NF4, converted")
SIDES = (*PLAIN, *NF4)
_READERS, _COPIED = 8, 2**24  # threads of "reading", and how many bytes each copies at a time


def measure(side: str, folder: pathlib.Path) -> dict[str, Any]:
    """Loads `folder` in this process: seconds, bytes that were read and, for jaxmoe in NF4, seconds by stage."""
    if side == "reading":
        return {"seconds": _read(folder), "bytes": _stored_bytes(folder)}
    if side.startswith("transformers"):
        return _transformers(folder, nf4="bitsandbytes" in side)
    return _jaxmoe_nf4(folder) if "NF4" in side else _jaxmoe(folder, verify="unverified" not in side)


def _stored_bytes(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _read(folder: pathlib.Path) -> float:
    """Seconds that threads need to copy all tensors into buffers that they reuse."""
    data = [np.asarray(np.memmap(file, np.uint8, "r")) for file in folder.glob("*.safetensors")]
    parts = [array[start : start + _COPIED] for array in data for start in range(0, array.size, _COPIED)]
    own = threading.local()

    def copy(part: np.ndarray) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = np.empty(_COPIED, np.uint8)
        own.buffer[: part.size] = part

    start = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        for _ in pool.map(copy, parts):
            pass
    return time.perf_counter() - start


def _transformers(folder: pathlib.Path, nf4: bool) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)  # CUDA starts before the clock does
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    more = {"quantization_config": quantization} if nf4 else {}
    start = time.perf_counter()
    AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device, **more, use_safetensors=True, trust_remote_code=False
    )
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "bytes": _stored_bytes(folder)}


def _jaxmoe(folder: pathlib.Path, verify: bool) -> dict[str, Any]:
    import jax

    from convert.hf2jax import read_hf
    from jaxmoe.store.converted import is_converted, read_converted
    from jaxmoe.store.loading import load_stacks

    jax.block_until_ready(jax.numpy.zeros(1))
    start = time.perf_counter()
    source = read_converted(folder, verify=verify) if is_converted(folder) else read_hf(folder)
    params = load_stacks(source.config, source)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": sum(array.nbytes for array in params.values())}


def _jaxmoe_nf4(folder: pathlib.Path) -> dict[str, Any]:
    import jax

    from jaxmoe.model.opening import open_checkpoint
    from jaxmoe.store.converted import is_converted
    from jaxmoe.store.digest import WeightsDigest, combined
    from jaxmoe.store.loading import load_stacks

    jax.block_until_ready(jax.numpy.zeros(1))
    times = [time.perf_counter()]
    config, source = open_checkpoint(folder, quantize=None if is_converted(folder) else "nf4")
    times.append(time.perf_counter())
    with WeightsDigest() as digest:
        params = load_stacks(config, source, on_layer=lambda *_: times.append(time.perf_counter()), digest=digest)
        jax.block_until_ready(params)
        times.append(time.perf_counter())
        combined(digest.parts())
        times.append(time.perf_counter())
    stages = {
        "opening the folder": times[1] - times[0],
        "top level and first layer, with compiling": times[2] - times[1],
        f"the other {len(times) - 5} layers": times[-3] - times[2],
        "what the device and the digest still did": times[-1] - times[-3],
    }
    return {"seconds": times[-1] - times[0], "bytes": _stored_bytes(folder), "stages": stages}


def main() -> None:
    """Prints the table; with --side one measurement as JSON."""
    parser = ArgumentParser(description="Loading a checkpoint to the device beside transformers.")
    shapes.add_arguments(parser)
    parser.add_argument("--model", type=pathlib.Path, metavar="DIR", help="load this folder instead of a random one")
    scratch_help = "where the checkpoint is written (default: /dev/shm)"
    parser.add_argument(
        "--scratch", type=pathlib.Path, default=pathlib.Path("/dev/shm"), metavar="DIR", help=scratch_help
    )
    parser.add_argument("--quantize", choices=("nf4",), help="compare what ends with weights in NF4")
    parser.add_argument("--converted", action="store_true", help="also convert the folder and load the result")
    sides = "sides to measure (default: transformers;jaxmoe, in NF4 all)"
    parser.add_argument("--sides", metavar="NAME;...", help=sides)
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
    sides = args.sides.split(";") if args.sides else [*NF4[:3]] if args.quantize else [*PLAIN[:2]]
    if args.converted:
        _convert(folder, scratch / "converted", args.quantize)
        sides += [side for side in (NF4 if args.quantize else PLAIN) if "converted" in side]
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
        for stage, seconds in found.get("stages", {}).items():
            print(f"  {stage:42}{seconds:7.2f}", flush=True)
    shapes.write_json(args.json, record)


def _convert(folder: pathlib.Path, target: pathlib.Path, quantize: str | None) -> None:
    """Runs `convert hf2jax` in a process of its own and prints how long it took."""
    command = [sys.executable, "-m", "convert", "hf2jax", str(folder), str(target)]
    start = time.perf_counter()
    subprocess.run([*command, *(["--quantize", quantize] if quantize else [])], check=True, capture_output=True)
    print(f"converted in {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    run(main)
