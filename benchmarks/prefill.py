"""Prefill on a GPU, from all tokens to the last token's logits, beside transformers: `python -m benchmarks.prefill`.

Each side runs in its own process, with random weights of a published shape and the same token ids and routers.
"of limit" is the share of the speed of a plain matmul, measured in the same process, that the operations of the forward
pass reach. Operations of the logits do not count: only the last token of each sequence has logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks import limits, random_model, shapes, stages
from benchmarks.sides import installed, measure_apart, stages_apart
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.memory import format_bytes

# sequences, tokens per sequence, whether a KV cache is written, as `jaxmoe.generate.engine` does
CASES = {
    "2 x 4096": (2, 4096, False),
    "2 x 4096, cached": (2, 4096, True),
    "1 x 16384": (1, 16384, False),
    "16 x 512, cached": (16, 512, True),
}
SIDES = ("transformers", "jaxmoe")


def jaxmoe_side(args: argparse.Namespace, config: Any, batch: int, length: int, cached: bool) -> dict[str, Any]:
    """The forward pass of jaxmoe, or its forward pass into an empty cache, and the last token's logits."""
    from jaxmoe.cli import xla

    xla.configure()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmoe.model.cache import NewTokens, empty_cache, forward_cached
    from jaxmoe.model.decoder import forward, head_weight, logits_of
    from jaxmoe.model.interface import Options, Tokens

    params = random_model.jax_parameters(config, args.quantize)

    def plain(params: Any, ids: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        tokens = Tokens(ids, positions, jnp.ones_like(ids))
        out = forward(params, {}, tokens, config=config, options=Options(packed=False))
        return logits_of(out.hidden[:, -1], head_weight(params)), out.stats.counts

    def into_cache(params: Any, ids: Any) -> Any:
        cache = empty_cache(config, batch, length, jnp.bfloat16)
        lengths = jnp.full(batch, length, jnp.int32)
        hidden, cache, _ = forward_cached(params, {}, NewTokens(ids, None, lengths), cache, config=config)
        return logits_of(hidden[:, -1], head_weight(params)), cache

    def ids_of(step: int) -> Any:
        return random_model.token_ids(config, batch, length, step)[:, :-1]

    jax.block_until_ready(params)
    start = time.perf_counter()
    compiled = jax.jit(into_cache if cached else plain).lower(params, ids_of(0)).compile()
    first = time.perf_counter() - start
    kept: Any = None

    def one(step: int) -> None:
        nonlocal kept
        logits, kept = compiled(params, ids_of(step))
        jax.device_get(logits)

    device = jax.local_devices()[0]
    found: dict[str, Any] = {"first_s": first, "seconds": _timed(one, args), "device": device.device_kind}
    found["peak"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if not cached:
        found["load"] = random_model.load_ratio(np.asarray(kept))
    if device.platform == "gpu":
        found["flops"] = limits.matmul_flops_per_second()
    if args.stages:
        ids = jax.device_put(ids_of(0))
        found["profile"] = stages.profile(lambda: compiled(params, ids), compiled)
    return found


def torch_side(args: argparse.Namespace, config: Any, batch: int, length: int, cached: bool) -> dict[str, Any]:
    """Transformers' model with its grouped_mm experts."""
    import torch

    model = random_model.torch_model(config).eval()
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"

    def ids(step: int) -> Any:
        return torch.from_numpy(random_model.token_ids(config, batch, length, step)[:, :-1]).long().to(device)

    load = random_model.torch_load(model, config, ids(0))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    @torch.no_grad()
    def one(step: int) -> None:
        model(input_ids=ids(step), use_cache=cached, logits_to_keep=1).logits.float().cpu()

    start = time.perf_counter()
    one(0)
    first = time.perf_counter() - start
    return {
        "seconds": _timed(one, args),
        "first_s": first,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "load": load,
        "peak": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


def _timed(one: Callable[[int], None], args: argparse.Namespace) -> float:
    """Median seconds from token ids on the host to the last token's logits on the host."""
    seconds = []
    for step in range(args.warmup + args.steps):
        start = time.perf_counter()
        one(step)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[args.warmup :])


def main() -> None:
    """Prints one table per case; with --side a single measurement as JSON."""
    parser = ArgumentParser(description="Prefill beside transformers.")
    shapes.add_arguments(parser, width=False)
    add = parser.add_argument
    add("--warmup", type=int, default=2, metavar="N", help="runs before the clock starts (default: 2)")
    add("--steps", type=int, default=5, metavar="N", help="timed runs, of which the median counts (default: 5)")
    add("--stages", action="store_true", help="also print jaxmoe's time by stage")
    add("--quantize", choices=("nf4", "fp8"), help="hold jaxmoe's projections and experts in 4 or 8 bits")
    add("--side", choices=SIDES, help="measure only this side, in this process, and print JSON")
    add("--case", choices=CASES, action="append", help="measure this case; may be repeated (default: all)")
    add("--sides", default=",".join(SIDES), metavar="NAME,...", help="sides in the table (default: all)")
    args = parser.parse_args()
    names = args.case or list(CASES)
    config = shapes.config_of(args)
    if args.side:
        side = jaxmoe_side if args.side == "jaxmoe" else torch_side
        print(json.dumps(side(args, config, *CASES[names[0]])))
        return

    known = ("preset", "layers", "warmup", "steps", "quantize")
    argv = [f"--{key}={value}" for key in known if (value := getattr(args, key)) is not None]
    record: dict[str, Any] = {}
    for name in names:
        batch, length, _ = CASES[name]
        print(f"\n{name}: {args.preset}, {config.num_hidden_layers} layers")
        print(f"{'':22}{'ms':>9}{'tokens/s':>10}{'of limit':>9}{'peak':>10}{'first':>8}{'load':>6}", flush=True)
        for side in args.sides.split(","):
            found: dict[str, Any] = {"failed": "not installed"}
            if installed(side):
                found = measure_apart("benchmarks.prefill", side, name, argv)
            record[f"{name}: {side}"] = found
            if "failed" in found:
                print(f"{side:22} {found['failed']}", flush=True)
                continue
            speed = batch * length / found["seconds"]
            share = ""
            if "flops" in found:
                share = f"{speed * limits.forward_flops(config, length, head=False) / found['flops']:.1%}"
            print(
                f"{side:22}{found['seconds'] * 1e3:9.1f}{speed:10,.0f}{share:>9}"
                f"{format_bytes(found['peak']) if found['peak'] else '':>10}{found['first_s']:7.1f}s"
                f"{format(found['load'], '6.2f') if 'load' in found else '':>6}  {found['device']}",
                flush=True,
            )
        if args.stages:
            print("\n".join(stages_apart("benchmarks.prefill", name, argv)), flush=True)
    shapes.write_json(args.json, record)


if __name__ == "__main__":
    run(main)
