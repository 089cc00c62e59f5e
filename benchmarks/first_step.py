"""The first training step of a fresh process, cold and from the compilation cache: `python -m benchmarks.first_step`.

The time runs from the start of the process to the loss on the host, without making the random weights on the device,
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

from benchmarks import shapes
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.memory import Remat

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
    from jaxmoe.train.optimizers import adamw, learning_rate
    from jaxmoe.train.step import Model, initial_state, make_train_step

    mark()
    xla.configure()
    jax.block_until_ready(jax.numpy.zeros(1))
    mark()
    config = shapes.config_of(args)
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
    shapes.add_arguments(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=2, metavar="N", help="sequences per step (default: 2)")
    add("--seq-length", type=int, default=4096, metavar="N", help="tokens per sequence (default: 4096)")
    add(
        "--lora-targets",
        default="attention",
        metavar="TEXT,...",
        help="where adapters are trained (default: attention)",
    )
    add("--remat", default="fast", choices=get_args(Remat), help="recomputation policy (default: fast)")
    add("--unroll", action="store_true", help="unroll the layers")
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
        f"{first['device']}: {args.preset}, {args.batch_size} x {args.seq_length} tokens, LoRA on {args.lora_targets}, "
        f"loss {first['loss']:.4f}; compilation cache of {kept / 1e6:.0f} MB"
    )
    print(f"{'seconds':<20}" + "".join(f"{name:>9}" for name in record))
    for stage in STAGES:
        print(f"{stage:<20}" + "".join(f"{found['stages'][stage]:9.2f}" for found in record.values()))
    print(f"{'first step':<20}" + "".join(f"{found['total']:9.2f}" for found in record.values()))
    shapes.write_json(args.json, record)


if __name__ == "__main__":
    run(main)
