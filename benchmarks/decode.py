"""Generating text on a GPU, token by token, beside transformers: `python -m benchmarks.decode`.

With `--mesh`, jaxmoe on several GPUs stands beside one; a batch counts the sequences of all GPUs together. Each side
runs in its own process, one batch after the other, with random weights of a published shape, the same routers and the
same prompts. A figure is the time between a generation of few tokens and one of many, so that reading the prompts does
not count. "peak" is that of the process so far. "of limit" is the share of the speed of a plain copy, measured in the
same process, at which the bytes that a step must read are read; `--no-limit` leaves it out, and with it the compilation
that counts a step's experts.
With `--quantize nf4` jaxmoe holds all matrices of the layers in NF4; transformers uses bitsandbytes for its linear
maps, but its experts are no linear maps, so they stay in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from benchmarks import limits, random_model, shapes
from benchmarks.sides import installed, measure_apart
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.memory import format_bytes

SIDES = ("transformers", "jaxmoe")


def jaxmoe_side(args: argparse.Namespace, config: Any) -> dict[int, dict[str, Any]]:
    """The engine of `python -m jaxmoe.generate`, greedy: the figures of each batch."""
    from jaxmoe.cli import xla

    xla.configure()

    from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
    from jaxmoe.distributed.placement import Placement
    from jaxmoe.generate.engine import Generator
    from jaxmoe.model.causal_lm import Qwen3MoeForCausalLM

    mesh = MeshShape.parse(args.mesh[0]) if args.mesh else ONE_DEVICE
    params = random_model.jax_parameters(config, args.quantize, placement=Placement(mesh, config, None))
    generator = Generator(Qwen3MoeForCausalLM(config, params, mesh=mesh))
    return {batch: _of_batch(args, generator, batch) for batch in args.batch}


def _of_batch(args: argparse.Namespace, generator: Any, batch: int) -> dict[str, Any]:
    import jax

    from jaxmoe.distributed.mesh import ONE_DEVICE
    from jaxmoe.generate.engine import RoutingLog

    config, device = generator.config, jax.local_devices()[0]
    prompts = _prompts(args, config, batch)
    found = _timed(lambda tokens: generator.generate(prompts, tokens), args) | {"device": device.device_kind}
    if not args.no_limit:
        log = RoutingLog(keep_logits=1)
        generator.generate(prompts, 8, routing=log)
        chosen = [np.asarray(step.experts) for step in log.steps[1:]]
        experts = float(np.mean([len(set(layer.reshape(-1).tolist())) for step in chosen for layer in step]))
        slots, nf4 = args.prompt + (args.few + args.many) // 2, args.quantize == "nf4"
        found |= {"experts": experts, "bytes": limits.decoded_token_bytes(config, experts, slots, batch, nf4=nf4)}
        if device.platform == "gpu" and generator.mesh == ONE_DEVICE:  # the limit is that of one GPU
            found["bytes_per_second"] = limits.copied_bytes_per_second()
    return found | {"peak": (device.memory_stats() or {}).get("peak_bytes_in_use")}


def torch_side(args: argparse.Namespace, config: Any) -> dict[int, dict[str, Any]]:
    """Transformers' `generate` with its KV cache, greedy; with `--quantize nf4` its linear maps in 4 bits."""
    import torch

    model = random_model.torch_model(config).eval()
    if args.quantize:
        random_model.quantize_linear_maps(model)
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"

    @torch.no_grad()
    def generate(prompts: Any, tokens: int) -> None:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **settings).cpu()

    # A step takes up to a tenth of a second on this side, always the same: a few are enough.
    few = argparse.Namespace(few=5, many=25, rounds=min(args.rounds, 2))
    found = {}
    for batch in args.batch:
        prompts = torch.tensor(_prompts(args, config, batch), device=device)
        found[batch] = _timed(partial(generate, prompts), few) | {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "peak": torch.cuda.max_memory_allocated() if on_gpu else None,
        }
    return found


def _prompts(args: argparse.Namespace, config: Any, batch: int) -> list[list[int]]:
    return random_model.token_ids(config, batch, args.prompt, 0)[:, :-1].tolist()


def _timed(generate: Callable[[int], Any], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step of the tokens after the first `few`, and the seconds of the very first generation."""
    start = time.perf_counter()
    generate(args.many)
    first = time.perf_counter() - start
    generate(args.few)
    seconds = []
    for _ in range(args.rounds):
        taken = []
        for tokens in (args.few, args.many):
            start = time.perf_counter()
            generate(tokens)
            taken.append(time.perf_counter() - start)
        seconds.append((taken[1] - taken[0]) / (args.many - args.few))
    return {"seconds": statistics.median(seconds), "first_s": first}


def main() -> None:
    """Prints the table; with --side a single measurement as JSON."""
    parser = ArgumentParser(description="Generating text beside transformers.")
    shapes.add_arguments(parser)
    add = parser.add_argument
    add("--quantize", choices=("nf4",), help="hold the matrices of the layers in 4 bits")
    add("--batch", type=int, nargs="+", default=[1, 16], metavar="N", help="sequences in a batch (default: 1 16)")
    add("--prompt", type=int, default=64, metavar="N", help="tokens of each prompt (default: 64)")
    add("--few", type=int, default=65, metavar="N", help="tokens of the generation that is subtracted (default: 65)")
    add("--many", type=int, default=192, metavar="N", help="tokens of the generation that is timed (default: 192)")
    add("--rounds", type=int, default=3, metavar="N", help="timed generations, of which the median counts (default: 3)")
    add("--no-limit", action="store_true", help="leave out the limit, for which other programs must be compiled")
    mesh = "jaxmoe on several GPUs beside one; may be repeated (expert=2)"
    add("--mesh", action="append", metavar="MESH", help=mesh)
    add("--side", choices=SIDES, help="measure only this side, in this process, and print JSON")
    add("--case", metavar="N,...", help="with --side: the batches")
    add("--sides", default=",".join(SIDES), metavar="NAME,...", help="sides in the table (default: all)")
    args = parser.parse_args()
    config = shapes.config_of(args)
    if args.side:
        if args.case:
            args.batch = [int(batch) for batch in args.case.split(",")]
        side = jaxmoe_side if args.side == "jaxmoe" else torch_side
        print(json.dumps(side(args, config)))
        return

    known = ("preset", "layers", "width", "quantize", "prompt", "few", "many", "rounds")
    argv = [f"--{key}={value}" for key in known if (value := getattr(args, key)) is not None]
    argv += ["--no-limit"] * args.no_limit
    record: dict[str, Any] = {}
    form = "NF4" if args.quantize else "bfloat16"
    print(f"{args.preset}, {config.num_hidden_layers} layers, {form}")
    print(f"{'batch':>5} {'side':14}{'ms/step':>9}{'tokens/s':>10}{'limit':>8}{'of limit':>9}{'peak':>10}{'first':>8}")
    for name, side, further in _rows(args):
        found: dict[str, Any] = {"failed": "not installed"}
        if args.quantize and side == "transformers" and not installed("bitsandbytes"):
            found["failed"] = "bitsandbytes is not installed"
        elif installed(side):
            batches = ",".join(map(str, args.batch))
            found = measure_apart("benchmarks.decode", side, batches, argv + further)
        for batch in args.batch:
            record[f"{batch}: {name}"] = each = found if "failed" in found else found[str(batch)]
            print(f"{batch:5} {name:14}{_line(each, batch)}", flush=True)
    shapes.write_json(args.json, record)


def _rows(args: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """(name, side, further flags) of each row of the table."""
    if args.mesh:
        return [("one GPU", "jaxmoe", []), *((mesh, "jaxmoe", [f"--mesh={mesh}"]) for mesh in args.mesh)]
    return [(side, side, []) for side in args.sides.split(",")]


def _line(found: dict[str, Any], batch: int) -> str:
    if "failed" in found:
        return f" {found['failed']}"
    limit = share = ""
    if "bytes_per_second" in found:
        least = found["bytes"] / found["bytes_per_second"]
        limit, share = f"{batch / least:,.0f}", f"{least / found['seconds']:.1%}"
    peak = format_bytes(found["peak"]) if found["peak"] else ""
    return (
        f"{found['seconds'] * 1e3:9.3f}{batch / found['seconds']:10,.1f}{limit:>8}{share:>9}{peak:>10}"
        f"{found['first_s']:7.1f}s  {found['device']}"
    )


if __name__ == "__main__":
    run(main)
