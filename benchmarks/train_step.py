"""One LoRA training step on a GPU beside transformers + PEFT and Unsloth: `python -m benchmarks.train_step`.

Random weights in a published model's full shape, the same token ids and routers on each side, rank 16, AdamW, the
optimizer included; each side in a process of its own. jaxmoe's row comes with a breakdown by named stage, and with its
share of the limit: the tokens a second at which the floating-point operations of a step that recomputes nothing would
keep the card at the speed of a plain matmul, measured in the same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from benchmarks import limits, random_model, stages
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.memory import Remat, human, training_forecast
from jaxmoe.presets import PRESETS

LEARNING_RATE = 1e-4


class Case(NamedTuple):
    """Adapters on what, rows, tokens a row, jaxmoe's recomputation policy and in how many micro-batches it takes the
    rows."""

    targets: str
    batch: int
    length: int
    remat: str
    accumulation: int = 1


CASES = {
    "attention": Case("attention", 2, 4096, "fast"),
    "attention + experts": Case("attention,experts", 2, 4096, "fast"),
    "attention, 1 x 16384": Case("attention", 1, 16384, "fast"),
    "attention, low memory": Case("attention", 2, 4096, "low-memory"),
    "attention, offload": Case("attention", 2, 4096, "offload"),
    "attention, offload, row by row": Case("attention", 2, 4096, "offload", accumulation=2),
    "longest": Case("attention", 1, 65536, "low-memory"),
}
PEERS = {
    "transformers + PEFT": "grouped_mm experts, sdpa, gradient checkpointing",
    "Unsloth": "16 bit, its own gradient checkpointing",
}
SIDES = {**PEERS, "jaxmoe": "--remat as the case says"}


def _config(args: argparse.Namespace) -> Qwen3MoeConfig:
    config = PRESETS[args.preset]
    if args.layers:
        config = config.replace(num_hidden_layers=args.layers)
    if args.width:  # for a machine without a GPU
        config = config.replace(hidden_size=args.width, moe_intermediate_size=64, num_experts=16, vocab_size=512)
    return config


def jaxmoe_side(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, Any]:
    """Compiles `jaxmoe.train.loop`'s step, times it, and says where the time goes."""
    from jaxmoe.cli import xla

    xla.configure()
    import jax
    import numpy as np

    from jaxmoe.data.packing import Batch
    from jaxmoe.model.init import init_adapters
    from jaxmoe.model.selection import selected_implementations
    from jaxmoe.train.loss import next_token_objective
    from jaxmoe.train.step import Model, adamw, initial_state, learning_rate, make_train_step

    # By default a row is one document, as where `jaxmoe.train.loop` finds no two that fit into one.
    packed = args.documents > 1
    taken: Any = selected_implementations(config, "bfloat16")
    remat: Any = args.remat or case.remat
    plan = training_forecast(
        config,
        lora,
        batch_size=case.batch // case.accumulation,
        seq_length=case.length,
        dtype="bfloat16",
        accumulation=case.accumulation,
        remat=remat,
        packed=packed,
        **taken,
    )
    shapes = jax.eval_shape(lambda: random_model.jax_parameters(config))
    adapters = jax.jit(init_adapters, static_argnums=(0, 1))(config, lora, jax.random.key(1))
    model: Any = Model(config, lora, "bfloat16", remat, packed, args.unroll)
    rate = learning_rate("constant", LEARNING_RATE, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    state = initial_state(adapters, optimizer)
    shape, document = (case.accumulation, -1, case.length), case.length // args.documents
    place = np.tile(np.arange(case.length, dtype=np.int32), case.batch).reshape(shape)
    segments, positions = place // document + 1, place % document
    weights = (positions < document - packed).astype(np.float32)

    def batch(index: int) -> Batch:
        ids = random_model.token_ids(config, case.batch, case.length, index)
        return Batch(ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape), weights, segments, positions)

    # As `jaxmoe.train.loop` does: before the weights, since XLA tries products on buffers of its own.
    start = time.perf_counter()
    step = jax.jit(make_train_step(model, optimizer, rate, next_token_objective()), donate_argnums=1)
    compiled = step.lower(shapes, state, batch(0)).compile()
    first = time.perf_counter() - start
    metrics: Any = None
    device = jax.local_devices()[0]
    peak = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")
    params = jax.block_until_ready(random_model.jax_parameters(config))
    before = peak()

    def one(index: int) -> float:
        nonlocal state, metrics
        state, metrics = compiled(params, state, batch(index))
        return float(metrics.loss)

    seconds, losses = _timed(one, args.warmup, args.steps)
    memory: Any = compiled.memory_analysis()
    found = {
        "seconds": seconds,
        "loss": losses[0],
        "device": device.device_kind,
        "first_s": first,
        "load": random_model.load_ratio(np.asarray(metrics.expert_counts)),
        "peak": peak(),
        "peak_before": before,
        "temporaries": memory.temp_size_in_bytes,
        "forecast": plan.total,
    }
    if device.platform == "gpu":
        # The peak of the step itself is measured; a matmul for the limit comes after it.
        found["flops"] = limits.matmul_flops_per_second()
    if args.stages:

        def queued() -> Any:
            nonlocal state, metrics
            state, metrics = compiled(params, state, batch(0))
            return metrics

        found["profile"] = stages.profile(queued, compiled, keep=args.trace)
    return found


def torch_side(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, Any]:
    """Transformers + PEFT, or Unsloth on a checkpoint of such weights."""
    import torch
    from peft import get_peft_model

    from tests.reference import peft_config

    if args.side == "Unsloth":
        model: Any = _unsloth(args, case, config, lora)
    else:
        base = random_model.torch_model(config)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
        model = get_peft_model(base, peft_config(lora))
    model.train()
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0, fused=True)

    def ids(index: int) -> Any:
        return torch.from_numpy(random_model.token_ids(config, case.batch, case.length, index)).long().to(device)

    load = random_model.torch_load(model, config, ids(args.warmup)[:, :-1])
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    def one(index: int) -> float:
        tokens = ids(index)
        # The shift is transformers': labels are the inputs, the first of them is not predicted.
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    start = time.perf_counter()
    one(0)
    first = time.perf_counter() - start
    seconds, losses = _timed(one, args.warmup, args.steps)
    return {
        "seconds": seconds,
        "loss": losses[0],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "first_s": first,
        "load": load,
        "peak": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _unsloth(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig, lora: LoraConfig) -> Any:
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    from benchmarks.load import write_checkpoint

    folder = args.scratch / "random-checkpoint"
    if not (folder / "config.json").is_file():
        write_checkpoint(folder, config)
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=case.length, load_in_4bit=False)
    targets = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in lora.targets]
    if "experts.gate_up_proj" in lora.targets:
        targets += ["gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=lora.r, lora_alpha=lora.alpha, target_modules=targets, use_gradient_checkpointing="unsloth"
    )


def _timed(one: Callable[[int], float], warmup: int, steps: int) -> tuple[float, list[float]]:
    """Median seconds of a step, from its inputs on the host to its loss on the host, and the losses."""
    for index in range(warmup):
        one(index)
    seconds, losses = [], []
    for index in range(steps):
        start = time.perf_counter()
        losses.append(one(warmup + index))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), losses


def measure_apart(
    side: str, name: str, argv: list[str], module: str = "benchmarks.train_step", flags: str = ""
) -> dict[str, Any]:
    """One side in a process of its own, with XLA `flags`: its numbers, or {"failed": the last line that it wrote}."""
    command = [sys.executable, "-m", module, *argv, "--side", side, "--case", name]
    # What the card has, for the longest rows; JAX takes three quarters of it otherwise.
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flags}".strip()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "RESOURCE_EXHAUSTED" in line]
        return {"failed": (errors or lines or ["no message"])[-1].strip()[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def profiled_apart(name: str, argv: list[str], module: str = "benchmarks.train_step") -> list[str]:
    """The lines of jaxmoe's breakdown by stage, from a process of its own without command buffers.

    What runs in a command buffer has no name of its own in the trace. The step is a little slower without them, so the
    speed in the table is another run's.
    """
    flags = "--xla_gpu_enable_command_buffer="
    found = measure_apart("jaxmoe", name, [*argv, "--stages"], module, flags)
    if "failed" in found:
        return ["", f"breakdown: {found['failed']}"]
    lines = ["", f"without command buffers: {found['seconds'] * 1e3:.1f} ms"]
    lines += stages.table(found["profile"], found["seconds"] * 1e3)
    lines += ["", "slowest instructions: ms a step, launches a step"]
    for instruction, ms, count, path in found["profile"]["slowest"]:
        lines.append(f"{ms:9.2f}{count:6}  {instruction}  {path[-90:]}")
    return lines


def installed(side: str) -> bool:
    """Whether this side's packages are there."""
    needed = {"transformers": ("torch",), "transformers + PEFT": ("torch", "peft"), "Unsloth": ("torch", "unsloth")}
    return all(importlib.util.find_spec(name) is not None for name in needed.get(side, ()))


def main() -> None:
    """Prints one table for each case; with --side one measurement as JSON."""
    parser = ArgumentParser(description="One LoRA training step beside transformers + PEFT and Unsloth.")
    parser.add_argument("--preset", default="qwen3-30b-a3b", choices=sorted(PRESETS), metavar="NAME")
    parser.add_argument("--layers", type=int, metavar="N", help="fewer layers than the preset's")
    parser.add_argument(
        "--width", type=int, metavar="N", help="a tiny model of this width, to try the benchmark itself"
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens a row instead of the case's")
    parser.add_argument("--documents", type=int, default=1, metavar="N", help="packed into each of jaxmoe's rows")
    parser.add_argument("--lora-r", type=int, default=16, metavar="N")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before the clock starts")
    parser.add_argument("--steps", type=int, default=5, metavar="N")
    parser.add_argument("--remat", choices=get_args(Remat), help="instead of the case's policy")
    parser.add_argument("--unroll", action="store_true", help="jaxmoe's layers compiled one by one")
    parser.add_argument("--stages", action="store_true", help="also a breakdown of jaxmoe's step by stage")
    parser.add_argument("--trace", type=pathlib.Path, metavar="FILE", help="with --stages: keep the profiler's trace")
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path("/dev/shm"), metavar="DIR")
    parser.add_argument("--side", choices=SIDES, help="measure this side only, in this process")
    parser.add_argument("--case", choices=CASES, action="append", help="this case (default: each in turn)")
    parser.add_argument("--sides", default=",".join(SIDES), metavar="NAME,...", help="which sides the tables have")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    names = args.case or list(CASES)
    config = _config(args)
    if args.side:
        case = CASES[names[0]]
        case = case._replace(length=args.length or case.length)
        lora = LoraConfig(r=args.lora_r, targets=expand_targets(case.targets.split(",")))
        side = jaxmoe_side if args.side == "jaxmoe" else torch_side
        print(json.dumps(side(args, case, config, lora)))
        return

    known = "preset layers width length documents lora_r warmup steps remat trace scratch".split()
    argv = ["--unroll"] if args.unroll else []
    argv += [f"--{key.replace('_', '-')}={value}" for key in known if (value := getattr(args, key)) is not None]
    record: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        case = case._replace(length=args.length or case.length)
        tokens = case.batch * case.length
        print(f"\n{name}: {args.preset}, {config.num_hidden_layers} layers, {case.batch} x {case.length} tokens")
        print(
            f"{'':22}{'ms/step':>9}{'tokens/s':>10}{'of limit':>9}{'peak':>10}{'first':>8}{'load':>6}  {'loss':<8}",
            flush=True,
        )
        for side in args.sides.split(","):
            found: dict[str, Any] = {"failed": "not installed"}
            if installed(side):
                found = measure_apart(side, name, argv)
            record[f"{name}: {side}"] = found
            if "failed" in found:
                print(f"{side:22} {found['failed']}", flush=True)
                continue
            speed = tokens / found["seconds"]
            work = limits.lora_step_flops(config, case.length // args.documents)
            limit = found["flops"] / work if "flops" in found else None
            print(
                f"{side:22}{found['seconds'] * 1e3:9.1f}{speed:10,.0f}{f'{speed / limit:.1%}' if limit else '':>9}"
                f"{human(found['peak']) if found['peak'] else '':>10}{found['first_s']:7.1f}s{found['load']:6.2f}"
                f"  {found['loss']:<8.4f}{found['device']}",
                flush=True,
            )
            if limit:
                print(
                    f"limit: {limit:,.0f} tokens/s at {found['flops'] / 1e12:.0f} TFLOP/s; "
                    f"temporaries of the step {human(found['temporaries'])}; "
                    f"peak before it {human(found['peak_before'])}, forecast {human(found['forecast'])}",
                    flush=True,
                )
        if args.stages:
            print("\n".join(profiled_apart(name, argv)), flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
