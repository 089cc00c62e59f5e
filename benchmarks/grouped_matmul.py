"""The expert layer's four products beside torch._grouped_mm: `python -m benchmarks.grouped_matmul`.

Qwen3-30B-A3B's shape (128 experts, top-8, D 2048, F 768), bfloat16, random weights, skewed routing. Useful TFLOP/s:
padding is not counted. Both sides are timed alike, over queued calls, in one process, on the same routing. Beside them
is what the card's library does with the same rows and one matrix for all of them: no experts, no padding.
"""

from __future__ import annotations

import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share of the memory

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.cli import ArgumentParser, run
from jaxmoe.dispatch import Schedule, expert_blocks, make_schedule
from jaxmoe.presets import PRESETS


def skewed_experts(tokens: int, num_experts: int, k: int, skew: float = 0.3, seed: int = 0) -> np.ndarray:
    """Expert ids [M, k] of a router whose mean logits differ by `skew` (standard deviation) between experts."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, num_experts)) + skew * rng.standard_normal(num_experts)
    return np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)


def seconds_per_call(call: Callable[[], Any], wait: Callable[[Any], None], queued: int = 10, repeat: int = 5) -> float:
    """Median over `repeat` of the mean time of `queued` calls that are launched without waiting."""
    wait(call())
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        result = None
        for _ in range(queued):
            result = call()
        wait(result)
        times.append((time.perf_counter() - start) / queued)
    return float(np.median(times))


def padded(rows: jax.Array, schedule: Schedule) -> jax.Array:
    """Routed rows [R, width], in routing order, at their places in the padded layout; zeros at padding."""
    return jnp.where(schedule.source[:, None] >= 0, rows[jnp.maximum(schedule.source, 0)], 0)


def products(D: int, F: int) -> dict[str, tuple[str, int, int, bool]]:
    """By name: (which stack, contracted width, output width, whether the stack is transposed)."""
    return {
        "up": ("gate_up", D, 2 * F, True),
        "down": ("down", F, D, True),
        "dX up": ("gate_up", 2 * F, D, False),
        "dX down": ("down", D, F, False),
    }


def measure(tokens: int, tiles: Any = None, check: bool = True, peer: bool = True) -> list[dict[str, Any]]:
    """One record per product: TFLOP/s here and with torch, relative error against float32."""
    from jaxmoe.kernels import grouped_matmul as kernel

    config = PRESETS["qwen3-30b-a3b"]
    D, F, E, k = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    experts = skewed_experts(tokens, E, k)
    sizes = np.bincount(experts.reshape(-1), minlength=E)
    schedule = jax.jit(make_schedule, static_argnums=(1, 2))(jnp.asarray(experts), E, kernel.TILE_ROWS)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 6)
    stacks = {"gate_up": draw(keys[0], (E, 2 * F, D)), "down": draw(keys[1], (E, D, F))}
    records = []
    for n, (name, (which, inner, out, transposed)) in enumerate(products(D, F).items()):
        rows = draw(keys[2 + n], (tokens * k, inner))
        x, weight = jax.jit(padded)(rows, schedule), stacks[which]

        @jax.jit
        def multiply(x, weight, transposed=transposed):
            return kernel.grouped_matmul(x, weight, expert_blocks(schedule), transposed=transposed, tiles=tiles)

        flops = 2 * tokens * k * inner * out
        record: dict[str, Any] = {"tokens": tokens, "product": name, "skew": float(sizes.max() / sizes.mean())}
        try:
            seconds = seconds_per_call(lambda x=x, w=weight: multiply(x, w), jax.block_until_ready)
        except Exception as error:
            record["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            records.append(record)
            continue
        record |= {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12}
        if check:
            record["error"] = _error(multiply(x, weight), x, weight, schedule, transposed)
        if peer:
            record["one_matrix_tflops"] = flops / _one_matrix(rows, weight[0], transposed) / 1e12
            torch_ms = _torch(rows, schedule, weight, sizes, transposed)
            record |= {"torch_ms": torch_ms * 1e3, "torch_tflops": flops / torch_ms / 1e12}
            record["ratio"] = record["tflops"] / record["torch_tflops"]
        records.append(record)
    return records


def _error(found: jax.Array, x: jax.Array, weight: jax.Array, schedule: Schedule, transposed: bool) -> float:
    """Relative L2 error over all used tiles, the products formed tile by tile in float32."""
    count = schedule.tile_expert.shape[0]
    x, found = x.reshape(count, -1, x.shape[-1]), found.reshape(count, -1, found.shape[-1])

    @jax.jit
    def sums(x, found, weight):
        def tile(i, total):
            w = weight[schedule.tile_expert[i]].astype(jnp.float32)
            exact = jnp.matmul(x[i].astype(jnp.float32), w.T if transposed else w, precision="highest")
            return total[0] + jnp.sum((found[i].astype(jnp.float32) - exact) ** 2), total[1] + jnp.sum(exact**2)

        return jax.lax.fori_loop(0, schedule.tiles_used, tile, (jnp.zeros(()), jnp.zeros(())))

    wrong, norm = sums(x, found, weight)
    return float(jnp.sqrt(wrong / norm))


def _one_matrix(rows: jax.Array, matrix: jax.Array, transposed: bool) -> float:
    """Seconds of XLA's product (cuBLAS) of all rows with one matrix."""
    multiply = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1 if transposed else 0,)), ((), ()))))
    return seconds_per_call(lambda: multiply(rows, matrix), jax.block_until_ready)


def _torch(rows: jax.Array, schedule: Schedule, weight: jax.Array, sizes: np.ndarray, transposed: bool) -> float:
    """Seconds of torch._grouped_mm on the same rows, sorted by expert, without padding."""
    import torch

    order = np.argsort(np.asarray(schedule.destination).reshape(-1))
    x = torch.from_dlpack(jax.block_until_ready(rows[order]))
    w = torch.from_dlpack(weight)
    offsets = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    w = w.transpose(-2, -1) if transposed else w
    return seconds_per_call(
        lambda: torch._grouped_mm(x, w, offs=offsets),  # pyright: ignore[reportPrivateImportUsage]
        lambda _: torch.cuda.synchronize(),
    )


def main() -> None:
    """Measures and prints the table."""
    parser = ArgumentParser(description="Grouped matmul of the experts beside torch._grouped_mm.")
    parser.add_argument("--tokens", default="2048,8192,32768", metavar="N,...")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    records = []
    print(f"{jax.devices()[0].device_kind}: useful TFLOP/s")
    print(
        f"{'tokens':>7} {'product':<8} {'jaxmoe':>7} {'torch':>7} {'ratio':>6} {'matrix':>7} {'error':>8} {'load':>6}"
    )
    for tokens in map(int, args.tokens.split(",")):
        for r in measure(tokens):
            records.append(r)
            if "failed" in r:
                print(f"{tokens:>7} {r['product']:<8} failed: {r['failed']}")
                continue
            numbers = f"{r['tflops']:>7.0f} {r['torch_tflops']:>7.0f} {r['ratio']:>6.2f} {r['one_matrix_tflops']:>7.0f}"
            print(f"{tokens:>7} {r['product']:<8} {numbers} {r['error']:>8.1e} {r['skew']:>6.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"device": jax.devices()[0].device_kind, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
