"""One LoRA training step on a GPU beside transformers + PEFT and Unsloth: `python -m benchmarks.train_step`.

Each side runs in its own process, with random weights of a published shape, the same token ids and routers, rank
16 and AdamW; the optimizer's time counts. "of limit" is the share of the speed of a plain matmul, measured in the same
process, that the operations of a step reach; recomputed operations do not count.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from benchmarks import limits, random_model, shapes, stages
from benchmarks.sides import installed, measure_apart, stages_apart
from jaxmoe.cli.arguments import ArgumentParser, add_memory_limit, run
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.cuda import OUTSIDE_POOL
from jaxmoe.memory import Remat, Workload, embedding_on_host, format_bytes, training_forecast
from jaxmoe.parameters import Quantization, quantizable, stored_specs

LEARNING_RATE = 1e-4


class Case(NamedTuple):
    """What has adapters, sequences, tokens per sequence, and jaxmoe's recomputation policy and micro-batches.

    The small cases are for a memory limit.
    """

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
    "attention, offload, one by one": Case("attention", 2, 4096, "offload", accumulation=2),
    "longest": Case("attention", 1, 65536, "low-memory"),
    "attention, 1 x 2048": Case("attention", 1, 2048, "balanced"),
    "attention + experts, 1 x 1024": Case("attention,experts", 1, 1024, "offload"),
}
PEERS = {
    "transformers + PEFT": "grouped_mm experts, sdpa, gradient checkpointing",
    "Unsloth": "16 bit, its own gradient checkpointing",
}
SIDES = {**PEERS, "jaxmoe": "the case's --remat"}


def jaxmoe_side(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, Any]:
    """The training step of jaxmoe: speed, memory and, with --stages, time by stage."""
    from jaxmoe import cuda
    from jaxmoe.cli import xla

    xla.configure(args.memory_limit)
    import jax
    import numpy as np

    from jaxmoe.data.packing import Batch
    from jaxmoe.model.init import init_adapters
    from jaxmoe.model.selection import selected_implementations
    from jaxmoe.train.host_memory import EMBEDDING, looked_up
    from jaxmoe.train.loss import next_token_objective
    from jaxmoe.train.step import Model, adamw, initial_state, learning_rate, make_train_step

    # By default a sequence is one document, as in training when no two fit into one.
    packed = args.documents > 1
    selected: Any = selected_implementations(config, "bfloat16")
    remat: Any = args.remat or case.remat
    sequences = case.batch // case.accumulation
    workload = Workload(config, lora, sequences, case.length, "bfloat16", case.accumulation, **selected)
    plan = training_forecast(replace(workload, remat=remat, packed=packed, quantize=args.quantize))
    specs = stored_specs(config, Quantization(quantizable(config)) if args.quantize else None)
    shapes = {path: jax.ShapeDtypeStruct(spec.shape, spec.dtype or "bfloat16") for path, spec in specs.items()}
    adapters = jax.jit(init_adapters, static_argnums=(0, 1))(config, lora, jax.random.key(1))
    model: Any = Model(config, lora, "bfloat16", remat, packed, args.unroll)
    rate = learning_rate("constant", LEARNING_RATE, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    state = initial_state(adapters, optimizer)
    on_host = (EMBEDDING,) if args.quantize and embedding_on_host(config, lora, remat) else ()
    shape, document = (case.accumulation, -1, case.length), case.length // args.documents
    place = np.tile(np.arange(case.length, dtype=np.int32), case.batch).reshape(shape)
    segments, positions = place // document + 1, place % document
    weights = (positions < document - packed).astype(np.float32)

    def batch(index: int) -> Batch:
        ids = random_model.token_ids(config, case.batch, case.length, index)
        return Batch(ids[:, :-1].reshape(shape), ids[:, 1:].reshape(shape), weights, segments, positions)

    # Compiled before the weights are made, as in training: XLA tries out products on its own buffers.
    start = time.perf_counter()
    step = jax.jit(make_train_step(model, optimizer, rate, next_token_objective()), donate_argnums=1)
    fed: Any = looked_up if on_host else lambda frozen, batch: (frozen, batch)
    frozen, first_batch = fed(shapes, batch(0))
    compiled = step.lower(frozen, state, first_batch).compile()
    first = time.perf_counter() - start
    metrics: Any = None
    device = jax.local_devices()[0]
    peak = lambda: (device.memory_stats() or {}).get("peak_bytes_in_use")
    params = jax.block_until_ready(random_model.jax_parameters(config, args.quantize, on_host))
    before = peak()

    def one(index: int) -> float:
        nonlocal state, metrics
        frozen, tokens = fed(params, batch(index))
        state, metrics = compiled(frozen, state, tokens)
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
    on_gpu = device.platform == "gpu"
    if on_gpu:
        found |= {"pool": (device.memory_stats() or {}).get("bytes_limit"), "used": cuda.used_bytes()}
    if args.stages:

        def queued() -> Any:
            nonlocal state, metrics
            frozen, tokens = fed(params, batch(0))
            state, metrics = compiled(frozen, state, tokens)
            return metrics

        found["profile"] = stages.profile(queued, compiled, keep=args.trace)
    if on_gpu:
        for array in jax.tree.leaves((params, state)):  # under a memory limit the products have no room beside them
            if isinstance(array, jax.Array):
                array.delete()
        found["flops"] = limits.matmul_flops_per_second()
    return found


def torch_side(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig, lora: LoraConfig) -> dict[str, Any]:
    """The step of transformers + PEFT, or of Unsloth on a random checkpoint."""
    import torch
    from peft import get_peft_model

    from peers.reference import peft_config

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
        # transformers shifts the labels itself: they are the inputs.
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

    from benchmarks.random_checkpoint import write_checkpoint

    folder = args.scratch / "random-checkpoint"
    if not (folder / "config.json").is_file():
        write_checkpoint(folder, config)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=case.length, load_in_4bit=False, trust_remote_code=False
    )
    targets = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in lora.targets]
    if "experts.gate_up_proj" in lora.targets:
        targets += ["gate_proj", "up_proj", "down_proj"]
    return FastLanguageModel.get_peft_model(
        model, r=lora.r, lora_alpha=lora.alpha, target_modules=targets, use_gradient_checkpointing="unsloth"
    )


def _timed(one: Callable[[int], float], warmup: int, steps: int) -> tuple[float, list[float]]:
    """(median seconds of a step, the losses), from inputs on the host to the loss on the host."""
    for index in range(warmup):
        one(index)
    seconds, losses = [], []
    for index in range(steps):
        start = time.perf_counter()
        losses.append(one(warmup + index))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), losses


def _held(found: dict[str, Any]) -> str:
    """What the process holds of the GPU, measured and forecast."""
    if found["used"] is None or found["pool"] is None:
        return "the process: unknown, since nvidia-smi cannot be asked"
    outside = found["used"] - found["pool"]
    return (
        f"the process: {format_bytes(found['used'])} = pool {format_bytes(found['pool'])} + {format_bytes(outside)} "
        f"outside it; peak + outside: {format_bytes(found['peak'] + outside)}, "
        f"forecast: {format_bytes(found['forecast'] + OUTSIDE_POOL)}"
    )


def main() -> None:
    """Prints one table per case; with --side a single measurement as JSON."""
    parser = ArgumentParser(description="One LoRA training step beside transformers + PEFT and Unsloth.")
    shapes.add_arguments(parser)
    add = parser.add_argument
    add("--length", type=int, metavar="N", help="tokens per sequence (default: the case's)")
    add("--documents", type=int, default=1, metavar="N", help="documents per sequence, jaxmoe only (default: 1)")
    add("--lora-r", type=int, default=16, metavar="N", help="rank of the adapters (default: 16)")
    add("--warmup", type=int, default=2, metavar="N", help="steps before the clock starts (default: 2)")
    add("--steps", type=int, default=5, metavar="N", help="timed steps, of which the median counts (default: 5)")
    add("--remat", choices=get_args(Remat), help="jaxmoe's recomputation policy (default: the case's)")
    add("--unroll", action="store_true", help="unroll jaxmoe's layers")
    add("--stages", action="store_true", help="also print jaxmoe's time by stage")
    add("--trace", type=pathlib.Path, metavar="FILE", help="with --stages: keep the profiler's trace")
    scratch = "where Unsloth's checkpoint is written (default: /dev/shm)"
    add("--scratch", type=pathlib.Path, default=pathlib.Path("/dev/shm"), metavar="DIR", help=scratch)
    add("--quantize", choices=["nf4"], help="hold jaxmoe's frozen projections and experts in 4 bits")
    add_memory_limit(parser)
    add("--side", choices=SIDES, help="measure only this side, in this process, and print JSON")
    add("--case", choices=CASES, action="append", help="measure this case; may be repeated (default: all)")
    add("--sides", default=",".join(SIDES), metavar="NAME,...", help="sides in the tables (default: all)")
    args = parser.parse_args()
    names = args.case or list(CASES)
    config = shapes.config_of(args)
    if args.side:
        case = CASES[names[0]]
        case = case._replace(length=args.length or case.length)
        lora = LoraConfig(r=args.lora_r, targets=expand_targets(case.targets.split(",")))
        side = jaxmoe_side if args.side == "jaxmoe" else torch_side
        print(json.dumps(side(args, case, config, lora)))
        return

    known = "preset layers width length documents lora_r warmup steps remat trace scratch quantize memory_limit".split()
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
                found = measure_apart("benchmarks.train_step", side, name, argv)
            record[f"{name}: {side}"] = found
            if "failed" in found:
                print(f"{side:22} {found['failed']}", flush=True)
                continue
            speed = tokens / found["seconds"]
            work = limits.lora_step_flops(config, case.length // args.documents)
            limit = found["flops"] / work if "flops" in found else None
            print(
                f"{side:22}{found['seconds'] * 1e3:9.1f}{speed:10,.0f}{f'{speed / limit:.1%}' if limit else '':>9}"
                f"{format_bytes(found['peak']) if found['peak'] else '':>10}{found['first_s']:7.1f}s"
                f"{found['load']:6.2f}  {found['loss']:<8.4f}{found['device']}",
                flush=True,
            )
            if limit:
                print(
                    f"limit: {limit:,.0f} tokens/s at {found['flops'] / 1e12:.0f} TFLOP/s; "
                    f"temporary buffers of the step: {format_bytes(found['temporaries'])}; "
                    f"peak before the step: {format_bytes(found['peak_before'])}; "
                    f"forecast: {format_bytes(found['forecast'])}",
                    flush=True,
                )
                print(_held(found), flush=True)
        if args.stages:
            print("\n".join(stages_apart("benchmarks.train_step", name, argv)), flush=True)
    shapes.write_json(args.json, record)


if __name__ == "__main__":
    run(main)
