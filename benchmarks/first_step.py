"""The first training step of a fresh process, cold and from the compilation cache: `python -m benchmarks.first_step`.

From the start of the process to the loss on the host; what is excluded is making the random weights, on the device,
which stands for loading them (`benchmarks.load`). The second run finds the programs that the first one compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, get_args

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.memory import Remat
from jaxmoe.presets import PRESETS

STAGES = ("start and imports", "device", "weights (excluded)", "state", "trace", "lower", "compile", "run")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage of this process, which started at `args.started` (Unix time)."""
    marks = [args.started]

    def mark() -> None:
        marks.append(time.time())

    import jax
    import numpy as np

    from benchmarks.random_model import jax_parameters, token_ids
    from jaxmoe.cli import xla
    from jaxmoe.data.packing import Batch
    from jaxmoe.model.init import init_adapters
    from jaxmoe.train.loss import next_token_objective
    from jaxmoe.train.step import Model, adamw, initial_state, learning_rate, make_train_step

    mark()
    xla.configure()
    jax.block_until_ready(jax.numpy.zeros(1))
    mark()
    config = PRESETS[args.preset]
    if args.layers:
        config = config.replace(num_hidden_layers=args.layers)
    if args.width:
        config = config.replace(hidden_size=args.width, moe_intermediate_size=64, num_experts=16, vocab_size=512)
    params = jax.block_until_ready(jax_parameters(config))
    mark()
    lora = LoraConfig(r=16, targets=expand_targets(args.lora_targets.split(",")))
    model = Model(config, lora, "bfloat16", args.remat, packed=False, unroll=args.unroll)
    rate = learning_rate("constant", 1e-4, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    adapters = jax.jit(init_adapters, static_argnums=(0, 1))(config, lora, jax.random.key(1))
    state = jax.block_until_ready(initial_state(adapters, optimizer))
    ids = token_ids(config, args.batch_size, args.seq_length, 0)[None]
    ones = np.ones(ids[..., 1:].shape, np.int32)
    positions = np.broadcast_to(np.arange(args.seq_length, dtype=np.int32), ones.shape)
    batch = Batch(ids[..., :-1], ids[..., 1:], ones.astype(np.float32), ones, positions)
    mark()
    step = jax.jit(make_train_step(model, optimizer, rate, next_token_objective()), donate_argnums=1)
    traced = step.trace(params, state, batch)
    mark()
    lowered = traced.lower()
    mark()
    compiled = lowered.compile()
    mark()
    _, metrics = compiled(params, state, batch)
    loss = float(metrics.loss)
    mark()
    seconds = {name: stop - start for name, start, stop in zip(STAGES, marks[:-1], marks[1:], strict=True)}
    total = sum(value for name, value in seconds.items() if "excluded" not in name)
    return {"stages": seconds, "total": total, "loss": loss, "device": jax.local_devices()[0].device_kind}


def main() -> None:
    """Prints the table; with --started one process's seconds as JSON."""
    parser = ArgumentParser(description="The first training step of a fresh process, cold and cached.")
    parser.add_argument("--preset", default="qwen3-30b-a3b", choices=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the preset's")
    parser.add_argument(
        "--width", type=int, metavar="N", help="a tiny model of this width, to try the benchmark itself"
    )
    parser.add_argument("--batch-size", type=int, default=2, metavar="N")
    parser.add_argument("--seq-length", type=int, default=4096, metavar="N")
    parser.add_argument("--lora-targets", default="attention", metavar="TEXT,...")
    parser.add_argument("--remat", default="fast", choices=get_args(Remat))
    parser.add_argument("--unroll", action="store_true", help="layers compiled one by one")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.started:
        print(json.dumps(measure(args)))
        return

    record = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "cached"):
            environment = os.environ | {"JAXMOE_COMPILATION_CACHE": cache}
            command = [sys.executable, "-m", "benchmarks.first_step", *sys.argv[1:], f"--started={time.time()}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise RuntimeError(done.stderr.strip()[-2000:])
            record[name] = json.loads(done.stdout.splitlines()[-1])
        kept = sum(file.stat().st_size for file in pathlib.Path(cache).rglob("*") if file.is_file())
    first = record["cold"]
    print(
        f"{first['device']}: {args.preset}, {args.batch_size} x {args.seq_length} tokens, {args.lora_targets}, loss "
        f"{first['loss']:.4f}; {kept / 1e6:.0f} MB in the cache"
    )
    print(f"{'seconds':<20}" + "".join(f"{name:>9}" for name in record))
    for stage in STAGES:
        print(f"{stage:<20}" + "".join(f"{found['stages'][stage]:9.2f}" for found in record.values()))
    print(f"{'first step':<20}" + "".join(f"{found['total']:9.2f}" for found in record.values()))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
