"""A LoRA step of torch_ref on one GPU beside transformers + PEFT: `python -m benchmarks.torch_ref_step`.

Each side runs in its own process, one after the other, since a GPU holds one 61 GB model. All sides use random
weights of Qwen3-30B-A3B's shape, made on the device, the same tokens, adapters on attention, and AdamW. The table shows
the median time of a step, the peak of allocated memory and the first loss: sides with the same loss have done the same
work. Below it are the milliseconds of one step by kind of kernel, from torch's profiler.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.presets import PRESETS

SIDES = ("transformers", "torch_ref", "torch_ref_4bit")
RANK = 16
GIB = 2**30
# A kernel belongs to the first kind whose pattern its name matches.
KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "decode 4 bit": r"dequantize",
    "grouped matmul": r"GroupProblemShape|grouped|_gmm",
    "matmul": r"nvjet|gemm|cublas|cutlass|xmma|splitK",
    "sort": r"sort|radix|scan|Scan",
    "gather, scatter": r"gather|scatter|index",
    "cross-entropy": r"[sS]oftmax|nll_loss|cross_entropy",
    "optimizer": r"multi_tensor|adam",
    "copy, cast": r"[cC]opy|Memcpy|Memset|CatArray",
    "reduce": r"reduce|norm",
    "elementwise": r"elementwise|triton",
}


def main() -> None:
    """Prints the table; with --side measures one side in this process and prints a line of JSON per measurement."""
    parser = ArgumentParser(description="A LoRA step of torch_ref beside transformers + PEFT, random weights.")
    add = parser.add_argument
    add("--preset", default="qwen3-30b-a3b", choices=sorted(PRESETS), metavar="NAME", help=f"of {', '.join(PRESETS)}")
    add("--config", type=pathlib.Path, metavar="DIR", help="use the shape of this HF folder instead of a preset")
    add("--layers", type=int, metavar="N", help="use this many layers (default: the shape's)")
    add("--batch-size", type=int, default=2, metavar="N", help="sequences per step (default: 2)")
    add("--seq-length", type=int, default=4096, metavar="N", help="tokens per sequence (default: 4096)")
    add("--warmup", type=int, default=2, metavar="N", help="steps before the clock starts (default: 2)")
    add("--steps", type=int, default=5, metavar="N", help="timed steps, of which the median counts (default: 5)")
    add("--kernels", type=int, default=0, metavar="N", help="also print the N longest kernels")
    add("--sides", default=",".join(SIDES), metavar="NAME,...", help="sides in the table, of " + ", ".join(SIDES))
    add("--side", choices=SIDES, help="measure only this side, in this process, and print JSON")
    add("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    if args.side:
        for row in measure(args):
            print(json.dumps(row), flush=True)
        return

    names = ("preset", "batch_size", "seq_length", "warmup", "steps", "kernels")
    argv = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    argv += [f"--{name}={getattr(args, name)}" for name in ("layers", "config") if getattr(args, name)]
    found: list[dict[str, Any]] = []
    for side in args.sides.split(","):
        found += measure_apart(side, argv)
    report(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure_apart(side: str, argv: list[str]) -> list[dict[str, Any]]:
    """Runs `measure` in its own process and shows its messages."""
    command = [sys.executable, "-m", "benchmarks.torch_ref_step", *argv, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side}: exit code {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def report(found: list[dict[str, Any]]) -> None:
    """Prints the table of steps, then the milliseconds by kind of kernel."""
    if not found:
        return
    peers = [row["ms"] for row in found if row["side"] == "transformers" and "ms" in row]
    print(
        f"{found[0]['device']}, torch {found[0]['torch']}, transformers {found[0]['transformers']}, {found[0]['shape']}"
    )
    print(
        f"{'':46}{'tokens':>9}{'ms/step':>9}{'tokens/s':>10}{'vs PEFT':>9}{'GiB':>7}{'loaded':>8}{'loss':>9}{'load':>6}"
    )
    for row in found:
        if "ms" not in row:
            print(f"{row['label']:46}{row['tokens']:>9}  {row['error']}")
            continue
        same = peers and row["tokens"] == found[0]["tokens"]
        ratio = f"{min(peers) / row['ms']:.2f}x" if same else ""
        print(
            f"{row['label']:46}{row['tokens']:>9}{row['ms']:9.1f}{row['tokens_per_s']:10,.0f}{ratio:>9}"
            f"{row['peak_gib']:7.1f}{row['loaded_gib']:8.1f}{row['loss']:9.4f}{row['load']:6.2f}"
        )
    print("\nload: the rows of the busiest expert divided by the mean. Milliseconds of one step by kind of kernel:")
    profiled = [row for row in found if row.get("kinds")]
    for row in profiled:
        kinds = ", ".join(f"{kind} {ms:.0f}" for kind, ms in row["kinds"].items())
        print(f"{row['label']} ({row['tokens']}), {sum(row['kinds'].values()):.0f} in total: {kinds}")
    for row in profiled:
        if row["kernels"]:
            print(f"\n{row['label']} ({row['tokens']}): ms, calls, kernel")
            for name, ms, calls in row["kernels"]:
                print(f"{ms:9.2f}{calls:7}  {name}")


def measure(args: Any) -> Iterator[dict[str, Any]]:
    """Runs one side in this process; one measurement for each way to run the step."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = hf_config(args)
    start = time.perf_counter()
    model, ways = sides()[args.side](config, device)
    peak, now = memory(device)
    print(f"{args.side}: model made in {time.perf_counter() - start:.1f} s, peak {peak:.2f} GiB", file=sys.stderr)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    shape = f"{args.config or args.preset}, {config.num_hidden_layers} layers, LoRA r {RANK} on attention"
    if os.environ.get("TORCH_REF_KERNELS") == "0":
        shape += ", torch_ref's kernels off"
    about = {"side": args.side, "device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    about |= {"shape": shape, "load_peak_gib": peak, "loaded_gib": now}
    sizes = [(args.batch_size, args.seq_length)]
    if args.side == "torch_ref_4bit":
        sizes.insert(0, (1, min(2048, args.seq_length)))
    fresh = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for batch, length in sizes:
        for label, prepare in ways.items():
            with torch.no_grad():
                for n, p in model.named_parameters():
                    if n in fresh:
                        p.copy_(fresh[n])
            row = {**about, "label": label, "tokens": f"{batch} x {length}"}
            try:
                yield row | time_steps(model, prepare(model), batch, length, args)
            except torch.OutOfMemoryError as error:
                yield row | {"error": str(error).splitlines()[0]}
            model.zero_grad(set_to_none=True)


def time_steps(model: Any, loss_of: Callable[[Any], Any], batch: int, length: int, args: Any) -> dict[str, Any]:
    """Median milliseconds of a step, peak memory, the first loss, the experts' load and the kernels of one step."""
    import torch

    device = model.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), generator=generator, device=device)

    def step() -> float:
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device, as a training loop that prints its loss does

    memory(device)
    load = expert_load(model, lambda: loss_of(ids))
    losses, seconds = [], []
    for _ in range(args.warmup + args.steps):
        start = time.perf_counter()
        losses.append(step())
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak, _ = memory(device)
    median = statistics.median(seconds[args.warmup :])
    kinds, kernels = profile(step, args.kernels) if device.type == "cuda" else ({}, [])
    return {
        "ms": 1e3 * median,
        "all_ms": [round(1e3 * s, 1) for s in seconds],
        "tokens_per_s": batch * length / median,
        "peak_gib": peak,
        "loss": losses[0],
        "load": load,
        "kinds": kinds,
        "kernels": kernels,
    }


def memory(device: Any) -> tuple[float, float]:
    """(peak since the last call, allocated now) in GiB; zeros on a CPU."""
    import torch

    if device.type != "cuda":
        return 0.0, 0.0
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return found


def profile(step: Callable[[], Any], longest: int) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """(milliseconds of one step by kind of kernel, the `longest` longest kernels with their calls)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    kinds: dict[str, float] = collections.defaultdict(float)
    kernels = []
    for event in profiler.key_averages():
        ms = event.self_device_time_total / 1e3
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
        kinds[kind] += ms
        kernels.append((event.key[:150], ms, event.count))
    kernels.sort(key=lambda kernel: -kernel[1])
    return dict(sorted(kinds.items(), key=lambda kind: -kind[1])), kernels[:longest]


def expert_load(model: Any, forward: Callable[[], Any]) -> float:
    """Rows of the busiest expert divided by the mean, averaged over the layers."""
    import torch

    loads = []

    def count(module: Any, _: Any, out: tuple[Any, ...]) -> None:
        counts = torch.zeros(module.num_experts, device=out[2].device)
        counts.scatter_add_(0, out[2].flatten(), torch.ones_like(out[2].flatten(), dtype=counts.dtype))
        loads.append(counts.max() / counts.mean())

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [router.register_forward_hook(count) for router in routers]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return float(torch.stack(loads).mean())


def hf_config(args: Any) -> Any:
    """The configuration that the arguments name."""
    from transformers import Qwen3MoeConfig

    if args.config:
        config = Qwen3MoeConfig.from_pretrained(args.config)
    else:
        config = Qwen3MoeConfig(**PRESETS[args.preset].to_hf())
    if args.layers:
        config.num_hidden_layers = args.layers
    config.use_cache = False
    return config


def draw(name: str, shape: Any, device: Any) -> Any:
    """The random weight `name` in bfloat16: ones for norms, else normal with standard deviation 0.02."""
    import torch

    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)


def random_model(config: Any, device: Any, **options: Any) -> Any:
    """A Qwen3MoeForCausalLM in bfloat16, made on the device."""
    import torch
    from torch import nn
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa", **options)
    for name, module in list(model.named_modules()):
        for local, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, local, nn.Parameter(draw(f"{name}.{local}", parameter.shape, device), requires_grad=False))
        if hasattr(module, "original_inv_freq"):
            rotary: Any = type(module)
            model.set_submodule(name, rotary(config=config).to(device))
    return model


def transformers_side(config: Any, device: Any) -> tuple[Any, dict[str, Any]]:
    """The peer: transformers + PEFT with grouped experts, sdpa, checkpointing; with its own loss and a chunked one."""
    import torch
    from peft import LoraConfig, get_peft_model

    from torch_ref.loss import cross_entropy, shifted_labels

    base = random_model(config, device, experts_implementation="grouped_mm")
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(base, lora).train()
    own = base.forward  # without PEFT's hooks: the adapters are in the modules

    def chunked(ids: Any) -> Any:
        hidden = base.model(input_ids=ids).last_hidden_state
        return cross_entropy(hidden.flatten(0, 1), base.lm_head, shifted_labels(ids).flatten())

    return model, {
        "transformers + PEFT": lambda _: lambda ids: own(input_ids=ids, labels=ids).loss,
        "transformers + PEFT, chunked loss": lambda _: chunked,
    }


def torch_ref_side(config: Any, device: Any) -> tuple[Any, dict[str, Any]]:
    """torch_ref in 16 bit: with each layer recomputed, and with nothing recomputed."""
    from torch_ref import FastQwen3MoeModel

    FastQwen3MoeModel.pre_patch()
    return adapted("torch_ref", random_model(config, device))


def torch_ref_4bit_side(config: Any, device: Any) -> tuple[Any, dict[str, Any]]:
    """torch_ref with attention and experts in NF4, quantised as they are made."""
    import torch
    from transformers import Qwen3MoeForCausalLM

    from torch_ref import FastQwen3MoeModel
    from torch_ref.checkpoint import build_4bit

    FastQwen3MoeModel.pre_patch()
    torch.manual_seed(0)
    reader: Any = RandomReader(config, device)
    base = build_4bit(
        Qwen3MoeForCausalLM, config, reader, torch.bfloat16, device, attn_implementation="sdpa", quantize_weights=True
    )
    return adapted("torch_ref, 4 bit", base)


class RandomReader:
    """Replaces `torch_ref.checkpoint.Reader`: draws a tensor instead of reading it from a file."""

    def __init__(self, config: Any, device: Any) -> None:
        import torch
        from transformers import Qwen3MoeForCausalLM

        with torch.device("meta"):
            model = Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self._device = device

    def __contains__(self, key: str) -> bool:
        return key in self._shapes

    def quantized(self, key: str) -> bool:
        """False: the drawn tensors are not quantised."""
        return False

    def rows(self, key: str, expert: int, rows: slice) -> Any:
        """Some rows of one expert."""
        return draw(key, (rows.stop - rows.start, self._shapes[key][2]), self._device)

    def read_dense(self, key: str, device: Any, dtype: Any) -> Any:
        """The whole tensor."""
        return draw(key, self._shapes[key], device).to(dtype)


def adapted(label: str, base: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the model with adapters on attention, and the two ways to run its step."""
    from torch_ref import FastQwen3MoeModel
    from torch_ref.lora import ATTENTION

    model = FastQwen3MoeModel.get_peft_model(base, r=RANK, lora_alpha=RANK, target_modules=ATTENTION)

    def prepare(recompute: bool) -> Callable[[Any], Callable[[Any], Any]]:
        def ready(model: Any) -> Callable[[Any], Any]:
            FastQwen3MoeModel.for_training(model, use_gradient_checkpointing=recompute)
            return lambda ids: model(input_ids=ids, labels=ids).loss

        return ready

    return model, {f"{label}, layers recomputed": prepare(True), f"{label}, nothing recomputed": prepare(False)}


def sides() -> dict[str, Callable[[Any, Any], tuple[Any, dict[str, Any]]]]:
    """Side -> a function that makes its model and the ways to run its step."""
    return {
        "transformers": transformers_side,
        "torch_ref": torch_ref_side,
        "torch_ref_4bit": torch_ref_4bit_side,
    }


if __name__ == "__main__":
    run(main)
