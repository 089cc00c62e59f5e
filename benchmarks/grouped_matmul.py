"""The expert layer's four products beside torch._grouped_mm: `python -m benchmarks.grouped_matmul`.

The shape is that of Qwen3-30B-A3B (128 experts, top-8, D 2048, F 768), in bfloat16, with random weights and skewed
routing. The table shows useful TFLOP/s: padding is not counted. "matrix" is the card's library with the same rows and
one matrix for all of them: no experts, no padding.

All sides run in one process on the same routing, over queued calls, in turn. These products reach the card's power
limit, where its clock depends on what ran before, so each round has a random order. The layout of the rows is made
before the clock starts, as it is once per layer in the model.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share of the memory

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import write_json
from benchmarks.timing import Side, seconds_in_turn
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.ops.kernels.grouped_matmul.hopper import HOPPER
from jaxmoe.ops.schedule import Schedule, make_schedule
from jaxmoe.presets import PRESETS


def skewed_experts(tokens: int, num_experts: int, k: int, skew: float = 0.3, seed: int = 0) -> np.ndarray:
    """Expert ids [M, k] of a router whose experts' mean logits have the standard deviation `skew`."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, num_experts)) + skew * rng.standard_normal(num_experts)
    return np.argsort(-logits, axis=1, kind="stable")[:, :k].astype(np.int32)


def padded(rows: jax.Array, schedule: Schedule) -> jax.Array:
    """Routed rows [R, width] moved to their places in the padded layout; zeros at padding."""
    return jnp.where(schedule.source[:, None] >= 0, rows[jnp.maximum(schedule.source, 0)], 0)


def products(D: int, F: int) -> dict[str, tuple[str, int, int, bool]]:
    """Name -> (stack of weights, contracted width, output width, whether the stack is transposed)."""
    return {
        "up": ("gate_up", D, 2 * F, True),
        "down": ("down", F, D, True),
        "dX up": ("gate_up", 2 * F, D, False),
        "dX down": ("down", D, F, False),
    }


def measure(tokens: int, rest: float = 0.0) -> list[dict[str, Any]]:
    """One record per product: TFLOP/s of each side, and jaxmoe's relative error against float32."""
    config = PRESETS["qwen3-30b-a3b"]
    D, F, E, k = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    experts = skewed_experts(tokens, E, k)
    sizes = np.bincount(experts.reshape(-1), minlength=E)
    layout = HOPPER.tile_rows(experts.size, E), HOPPER.span_rows(experts.size, E)
    schedule = jax.jit(make_schedule, static_argnums=(1, 2, 3))(jnp.asarray(experts), E, *layout)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 6)
    stacks = {"gate_up": draw(keys[0], (E, 2 * F, D)), "down": draw(keys[1], (E, D, F))}
    records = []
    for n, (name, (which, inner, out, transposed)) in enumerate(products(D, F).items()):
        rows = draw(keys[2 + n], (tokens * k, inner))
        x, weight = jax.jit(padded)(rows, schedule), stacks[which]

        @jax.jit
        def multiply(x, weight, transposed=transposed):
            return HOPPER.matmul(x, weight, schedule, 0, transposed=transposed)

        flops = 2 * tokens * k * inner * out
        sides = {
            "jaxmoe": Side(lambda x=x, w=weight: multiply(x, w), jax.block_until_ready),
            "torch": _torch(rows, schedule, weight, sizes, transposed),
            "one matrix": _one_matrix(rows, weight[0], transposed),
        }
        seconds = seconds_in_turn(sides, rest=rest)
        record: dict[str, Any] = {"tokens": tokens, "product": name, "skew": float(sizes.max() / sizes.mean())}
        record |= {f"{side} TFLOP/s": flops / taken / 1e12 for side, taken in seconds.items()}
        record["ratio"] = seconds["torch"] / seconds["jaxmoe"]
        record["error"] = _error(multiply(x, weight), x, weight, schedule, transposed)
        records.append(record)
    return records


def _error(found: jax.Array, x: jax.Array, weight: jax.Array, schedule: Schedule, transposed: bool) -> float:
    """Relative L2 error over all used tiles, against products computed tile by tile in float32."""
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


def _one_matrix(rows: jax.Array, matrix: jax.Array, transposed: bool) -> Side:
    """XLA's product (cuBLAS) of all rows with one matrix."""
    multiply = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1 if transposed else 0,)), ((), ()))))
    return Side(lambda: multiply(rows, matrix), jax.block_until_ready)


def _torch(rows: jax.Array, schedule: Schedule, weight: jax.Array, sizes: np.ndarray, transposed: bool) -> Side:
    """torch._grouped_mm on the same rows, sorted by expert, without padding."""
    import torch

    order = np.argsort(np.asarray(schedule.destination).reshape(-1))
    x = torch.from_dlpack(jax.block_until_ready(rows[order]))
    w = torch.from_dlpack(weight)
    offsets = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    w = w.transpose(-2, -1) if transposed else w
    return Side(
        lambda: torch._grouped_mm(x, w, offs=offsets),  # pyright: ignore[reportPrivateImportUsage]
        lambda _: torch.cuda.synchronize(),
    )


def main() -> None:
    """Measures and prints the table."""
    parser = ArgumentParser(description="Grouped matmul of the experts beside torch._grouped_mm.")
    parser.add_argument("--tokens", default="2048,8192,32768", metavar="N,...", help="tokens, a table line for each")
    parser.add_argument("--rest", type=float, default=0.0, metavar="SECONDS", help="pause before each side's calls")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    records = []
    print(f"{jax.devices()[0].device_kind}: useful TFLOP/s")
    print(
        f"{'tokens':>7} {'product':<8} {'jaxmoe':>7} {'torch':>7} {'ratio':>6} {'matrix':>7} {'error':>8} {'load':>6}"
    )
    for tokens in map(int, args.tokens.split(",")):
        for r in measure(tokens, args.rest):
            records.append(r)
            ours, torch, matrix = (r[f"{side} TFLOP/s"] for side in ("jaxmoe", "torch", "one matrix"))
            numbers = f"{ours:>7.0f} {torch:>7.0f} {r['ratio']:>6.2f} {matrix:>7.0f}"
            print(f"{tokens:>7} {r['product']:<8} {numbers} {r['error']:>8.1e} {r['skew']:>6.2f}", flush=True)
    write_json(args.json, {"device": jax.devices()[0].device_kind, "records": records})


if __name__ == "__main__":
    run(main)
