"""Loading a checkpoint from memory-backed disk to the device beside transformers: `python -m benchmarks.load`.

Writes a checkpoint of a published shape (or of fewer layers) in HF form, or takes the folder that is named, and loads
it once on each side, each side in a process of its own: seconds from the call to weights that are on the device,
imports excluded. Host memory is the largest anonymous one of the whole process; the mapped checkpoint is page cache and
no part of it. jaxmoe also loads the converted folder when `--converted` asks for it.
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
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.conversion_memory import anonymous_bytes
from benchmarks.random_model import STD, routers
from benchmarks.train_step import installed
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.memory import human
from jaxmoe.presets import PRESETS

SIDES = ("transformers", "jaxmoe", "jaxmoe, converted", "jaxmoe, converted, unverified")
_POOL = 1 << 26  # normal numbers that all tensors are cut from


def write_checkpoint(folder: pathlib.Path, config: Qwen3MoeConfig, max_shard_size: int = 4 * 10**9) -> None:
    """A checkpoint in HF form with one tensor per expert, in bfloat16; routers as in `random_model`.

    Tensors are pieces of one pool of normal numbers, from random places: made at the speed of a copy.
    """
    from convert.names import blocks_of, rows
    from convert.safetensors_io import Planned, write_sharded

    rng = np.random.default_rng(0)
    dtype = np.dtype(ml_dtypes.bfloat16)
    pool = (rng.standard_normal(_POOL, dtype=np.float32) * STD).astype(dtype)
    gates = dict(zip(config.sparse_layers, routers(config), strict=True))
    table = [(layer, row) for layer in blocks_of(config) for row in rows(config, layer, "per_expert")]

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for layer, row in table:
            size = int(np.prod(row.shape))
            if len(row.shape) == 1:
                array = np.ones(row.shape, dtype)
            elif row.path == "sparse.gate":
                assert layer is not None
                array = gates[layer].astype(dtype)
            elif size > _POOL:  # the embedding
                array = np.resize(pool, row.shape)
            else:
                start = int(rng.integers(0, _POOL - size + 1))
                array = pool[start : start + size].reshape(row.shape)
            yield row.key, array

    folder.mkdir(parents=True, exist_ok=True)
    write_sharded(folder, [Planned(row.key, row.shape, dtype) for _, row in table], tensors(), max_shard_size)
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")


def measure(side: str, folder: pathlib.Path) -> dict[str, Any]:
    """Loads `folder` in this process: seconds, and bytes on the device."""
    if side == "transformers":
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.zeros(1, device=device)  # CUDA's own start is not loading
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device)
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
    parser.add_argument("--preset", default="qwen3-30b-a3b", choices=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the preset's")
    parser.add_argument(
        "--width", type=int, metavar="N", help="a tiny model of this width, to try the benchmark itself"
    )
    parser.add_argument("--model", type=pathlib.Path, metavar="DIR", help="load this folder instead")
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("/dev/shm"), metavar="DIR")
    parser.add_argument("--converted", action="store_true", help="also convert the folder and load that")
    parser.add_argument("--sides", default="transformers;jaxmoe", metavar="NAME;...")
    parser.add_argument("--side", choices=SIDES, help="measure this side only, in this process")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers here")
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
        config = PRESETS[args.preset]
        if args.layers:
            config = config.replace(num_hidden_layers=args.layers)
        if args.width:
            config = config.replace(hidden_size=args.width, moe_intermediate_size=64, num_experts=16, vocab_size=512)
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
            f"{side:32}{found['seconds']:9.1f}{found['bytes'] / found['seconds'] / 1e9:8.2f}{human(peak):>14}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
