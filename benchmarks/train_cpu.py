"""LoRA training throughput on a CPU beside transformers + PEFT: `python -m benchmarks.train_cpu`.

Each side runs in its own process, with the same checkpoint, adapters, batches, optimizer and number of cores, in
float32 and, unless the table says so, without recomputation. PEFT runs once with each of transformers' implementations
of the experts. The table also shows the loss after the warm-up: sides with the same loss have done the same work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.errors import UserError

LEARNING_RATE = 1e-3
TARGETS = {"attention": ["attention"], "attention and experts": ["attention", "experts"]}
SIDES = {
    "PEFT, eager": "experts one by one",
    "PEFT, grouped_mm": "tokens sorted by expert",
    "PEFT, batched_mm": "each token's expert weights gathered",
    "jaxmoe": "--remat fast",
    "jaxmoe, recomputing": "--remat low-memory: each layer runs again in the backward pass",
}


def batch_of(config: Qwen3MoeConfig, args: argparse.Namespace, step: int) -> np.ndarray:
    """Token ids [B, T + 1] of one step."""
    rng = np.random.default_rng([args.seed, step])
    return rng.integers(0, config.vocab_size, (args.batch_size, args.seq_length + 1), dtype=np.int32)


def adapters_of(config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, np.ndarray]:
    """A fresh adapter (A random, B zero), the same on each side."""
    from peers.configs import random_adapters

    drawn = random_adapters(config, lora)
    return {path: array if path.endswith("lora_A") else np.zeros_like(array) for path, array in drawn.items()}


def jaxmoe_step(args: argparse.Namespace, lora: LoraConfig, recompute: bool) -> Callable[[int], float]:
    """One optimizer step of jaxmoe, as `jaxmoe.train.loop` runs it; returns the loss."""
    import jax
    import jax.numpy as jnp

    from jaxmoe.data.packing import Batch
    from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM
    from jaxmoe.train.loss import next_token_objective
    from jaxmoe.train.optimizers import adamw, learning_rate
    from jaxmoe.train.step import Model, initial_state, make_train_step

    module = Qwen3MoeForCausalLM.from_pretrained(args.model, dtype="float32")
    config, frozen = module.config, module.params
    rate = learning_rate("constant", LEARNING_RATE, 0, 1)
    model = Model(config, lora, remat="low-memory" if recompute else "fast")
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    state = initial_state({path: jnp.asarray(a) for path, a in adapters_of(config, lora).items()}, optimizer)
    train_step = jax.jit(make_train_step(model, optimizer, rate, next_token_objective()), donate_argnums=1)
    ones = np.ones((1, args.batch_size, args.seq_length), np.int32)
    positions = np.broadcast_to(np.arange(args.seq_length, dtype=np.int32), ones.shape)

    def step(index: int) -> float:
        nonlocal state
        ids = batch_of(config, args, index)[None]
        batch = Batch(ids[..., :-1], ids[..., 1:], ones.astype(np.float32), ones, positions)
        state, metrics = train_step(frozen, state, batch)
        return float(metrics.loss)

    return step


def peft_step(args: argparse.Namespace, lora: LoraConfig, experts: str) -> Callable[[int], float]:
    """One optimizer step of transformers + PEFT; returns the loss."""
    import torch

    from peers.reference import Reference

    torch.set_num_threads(args.cores)
    config = Qwen3MoeConfig.from_pretrained(args.model)
    adapters = adapters_of(config, lora)
    model = Reference.from_pretrained(
        args.model, attention="sdpa", experts=experts, lora=lora, adapters=adapters
    ).model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)

    def step(index: int) -> float:
        ids = torch.from_numpy(batch_of(config, args, index)).long()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Runs one side in this process: median seconds of the steps after the warm-up, and the loss of the first one."""
    lora = LoraConfig(r=args.lora_r, targets=expand_targets(TARGETS[args.targets]))
    if args.side.startswith("jaxmoe"):
        step = jaxmoe_step(args, lora, "recomputing" in args.side)
    else:
        step = peft_step(args, lora, args.side.removeprefix("PEFT, "))
    for index in range(args.warmup):
        step(index)
    seconds, losses = [], []
    # A slow side may stop early, but needs three steps for a median.
    while len(seconds) < args.steps and (len(seconds) < 3 or sum(seconds) < args.seconds):
        start = time.perf_counter()
        losses.append(step(args.warmup + len(seconds)))
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "loss": losses[0]}


def measure_apart(side: str, targets: str, argv: list[str]) -> dict[str, float]:
    """Runs `measure` in its own process."""
    command = [sys.executable, "-m", "benchmarks.train_cpu", *argv, "--side", side, "--targets", targets]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints one table per choice of adapters; with --side a single measurement as JSON."""
    parser = ArgumentParser(description="LoRA training throughput on a CPU beside transformers + PEFT.")
    add = parser.add_argument
    demo = pathlib.Path("tests/checkpoints/qwen3-moe-stdlib")
    add("--model", type=pathlib.Path, default=demo, metavar="DIR", help="HF folder (default: the demo checkpoint)")
    add("--batch-size", type=int, default=4, metavar="N", help="sequences per step (default: 4)")
    add("--seq-length", type=int, default=512, metavar="N", help="tokens per sequence (default: 512)")
    add("--lora-r", type=int, default=16, metavar="N", help="rank of the adapters (default: 16)")
    cores = min(2, len(os.sched_getaffinity(0)))
    add("--cores", type=int, default=cores, metavar="N", help="cores that each side may use (default: at most 2)")
    add("--warmup", type=int, default=2, metavar="N", help="steps before the clock starts (default: 2)")
    add(
        "--steps", type=int, default=7, metavar="N", help="timed steps at most, of which the median counts (default: 7)"
    )
    add("--seconds", type=float, default=30.0, metavar="S", help="stop a side after this time (default: 30)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the batches (default: 0)")
    add("--side", choices=SIDES, help="measure only this side, in this process, and print JSON")
    add("--targets", choices=TARGETS, help="adapters on these only (default: one table for each)")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: expected a folder in HF form, found no config.json")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    if args.side:
        print(json.dumps(measure(args)))
        return

    tokens = args.batch_size * args.seq_length
    print(
        f"{args.model}: {args.batch_size} x {args.seq_length} tokens, float32, rank {args.lora_r}, {args.cores} cores"
    )
    names = ("model", "batch_size", "seq_length", "lora_r", "cores", "warmup", "steps", "seconds", "seed")
    argv = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    for targets in [args.targets] if args.targets else TARGETS:
        print(f"\nadapters on {targets}; the median of up to {args.steps} steps, optimizer included")
        print(f"{'':22}{'s/step':>8}{'tokens/s':>10}{'vs PEFT':>9}   {'loss':<10}", flush=True)
        fastest = math.inf
        for side, note in SIDES.items():
            result = measure_apart(side, targets, argv)
            seconds, ratio = result["seconds"], ""
            if side.startswith("PEFT"):
                fastest = min(fastest, seconds)
            else:
                ratio = f"{fastest / seconds:.2f}x"
            row = f"{side:22}{seconds:8.3f}{tokens / seconds:10,.0f}{ratio:>9}   {result['loss']:<10.5f}"
            print(row + note, flush=True)


if __name__ == "__main__":
    run(main)
