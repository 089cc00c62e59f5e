"""One training step on GPUs: `python -m benchmarks.train_step`.

jaxmoe's LoRA step stands beside transformers + PEFT and Unsloth; with `--mesh`, on several GPUs beside one. Each side
runs in its own process, with random weights of a published shape, the same token ids and routers, rank 16 and AdamW;
the optimizer's time counts. "of limit" is the share of the speed of a plain matmul, measured in the same process, that
the operations of a step reach; recomputed operations do not count.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any, get_args

from benchmarks import limits, random_model, shapes
from benchmarks.jaxmoe_step import LEARNING_RATE, Case, measure, timed, tokens_per_second
from benchmarks.sides import installed, measure_apart, stages_apart
from jaxmoe.cli.arguments import ArgumentParser, add_memory_limit, run
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.cuda import OUTSIDE_POOL
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.memory import Remat, format_bytes

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
    "all parameters": Case("", 1, 4096, "low-memory"),
}
PEERS = {
    "transformers + PEFT": "grouped_mm experts, sdpa, gradient checkpointing",
    "Unsloth": "16 bit, its own gradient checkpointing",
}
SIDES = {**PEERS, "jaxmoe": "the case's --remat"}


def torch_side(args: argparse.Namespace, case: Case, config: Qwen3MoeConfig) -> dict[str, Any]:
    """The step of transformers + PEFT, or of Unsloth on a random checkpoint."""
    import torch
    from peft import get_peft_model

    from peers.reference import peft_config

    lora = case.lora(args.lora_r)
    assert lora is not None
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
    seconds, losses = timed(one, args.warmup, args.steps)
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
    args = _parser().parse_args()
    names = args.case or [name for name in CASES if CASES[name].targets]
    cases = {name: CASES[name]._replace(length=args.length or CASES[name].length) for name in names}
    config = shapes.config_of(args)
    if args.side:
        case = cases[names[0]]
        print(json.dumps(measure(args, case, config) if args.side == "jaxmoe" else torch_side(args, case, config)))
        return
    table = mesh_table if args.mesh else _sides_table
    record: dict[str, Any] = {}
    for name, case in cases.items():
        record |= table(args, name, case, config)
    shapes.write_json(args.json, record)


def _parser() -> ArgumentParser:
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
    mesh = "jaxmoe on several GPUs beside one, the case's sequences on each; may be repeated (data=2)"
    add("--mesh", action="append", metavar="MESH", help=mesh)
    add("--stages", action="store_true", help="also print jaxmoe's time by stage")
    add("--trace", type=pathlib.Path, metavar="FILE", help="with --stages: keep the profiler's trace")
    scratch = "where Unsloth's checkpoint is written (default: /dev/shm)"
    add("--scratch", type=pathlib.Path, default=pathlib.Path("/dev/shm"), metavar="DIR", help=scratch)
    add("--quantize", choices=["nf4", "fp8"], help="hold jaxmoe's frozen projections and experts in 4 or 8 bits")
    add_memory_limit(parser)
    add("--side", choices=SIDES, help="measure only this side, in this process, and print JSON")
    add(
        "--case",
        choices=CASES,
        action="append",
        help="measure this case; may be repeated (default: those with adapters)",
    )
    add("--sides", default=",".join(SIDES), metavar="NAME,...", help="sides in the tables (default: all)")
    return parser


def flags(args: argparse.Namespace) -> list[str]:
    """What a process that measures one side is given, besides the side, the case and the mesh."""
    known = "preset layers width length documents lora_r warmup steps remat trace scratch quantize memory_limit".split()
    found = ["--unroll"] if args.unroll else []
    return found + [f"--{key.replace('_', '-')}={value}" for key in known if (value := getattr(args, key)) is not None]


def _sides_table(args: argparse.Namespace, name: str, case: Case, config: Qwen3MoeConfig) -> dict[str, Any]:
    """Prints jaxmoe and its peers, and returns their numbers."""
    tokens, record, argv = case.batch * case.length, {}, flags(args)
    print(f"\n{name}: {args.preset}, {config.num_hidden_layers} layers, {case.batch} x {case.length} tokens")
    print(
        f"{'':22}{'ms/step':>9}{'tokens/s':>10}{'of limit':>9}{'peak':>10}{'first':>8}{'load':>6}  {'loss':<8}",
        flush=True,
    )
    for side in args.sides.split(","):
        found: dict[str, Any] = {"failed": "not installed"}
        if side != "jaxmoe" and not case.targets:
            found = {"failed": "not compared: the peers train adapters"}
        elif installed(side):
            found = measure_apart("benchmarks.train_step", side, name, argv)
        record[f"{name}: {side}"] = found
        if "failed" in found:
            print(f"{side:22} {found['failed']}", flush=True)
            continue
        speed = tokens / found["seconds"]
        work = limits.step_flops(config, case.length // args.documents, full=not case.targets)
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
    return record


def mesh_table(args: argparse.Namespace, name: str, case: Case, config: Qwen3MoeConfig) -> dict[str, Any]:
    """Prints jaxmoe on each mesh beside one GPU, all measured in turn, and returns their numbers.

    "of n" is the speed over n times that of one GPU; "of limit" that over the limit of n GPUs. "peak" is the most that
    each GPU has held.
    """
    record: dict[str, Any] = {}
    print(
        f"\n{name}: {args.preset}, {config.num_hidden_layers} layers, {case.batch} x {case.length} tokens on each GPU"
    )
    print(
        f"{'':22}{'ms/step':>9}{'tokens/s':>10}{'of n':>7}{'of limit':>9}{'forecast':>10}{'first':>8}{'load':>6}  "
        f"{'loss':<9}peak",
        flush=True,
    )
    one = None
    for text in (None, *args.mesh):
        mesh = MeshShape.parse(text) if text else ONE_DEVICE
        argv = flags(args) + ([f"--mesh={text}"] if text else [])
        found = record[f"{name}: {text or 'one GPU'}"] = measure_apart("benchmarks.train_step", "jaxmoe", name, argv)
        if "failed" in found:
            print(f"{text or 'one GPU':22} {found['failed']}", flush=True)
            continue
        speed = tokens_per_second(found, case, mesh)
        one = one if text else speed
        limit = ""
        if "flops" in found:
            work = limits.step_flops(config, case.length // args.documents, full=not case.targets)
            limit = f"{speed / mesh.size * work / found['flops']:.1%}"
        print(
            f"{text or 'one GPU':22}{found['seconds'] * 1e3:9.1f}{speed:10,.0f}"
            f"{f'{speed / mesh.size / one:.3f}' if one else '':>7}{limit:>9}{format_bytes(found['forecast']):>10}"
            f"{found['first_s']:7.1f}s{found['load']:6.2f}  {found['loss']:<9.4f}"
            f"{', '.join(map(format_bytes, found['peaks']))}",
            flush=True,
        )
        if args.stages:
            print("\n".join(stages_apart("benchmarks.train_step", name, argv)), flush=True)
    return record


if __name__ == "__main__":
    run(main)
