"""The expert layer's four products beside torch._grouped_mm: `python -m benchmarks.grouped_matmul`.

The shape is that of Qwen3-30B-A3B (128 experts, top-8, D 2048, F 768), in bfloat16, with random weights and skewed
routing. The table shows useful TFLOP/s: padding is not counted. "matrix" is the card's library with the same rows and
one matrix for all of them: no experts, no padding.

All sides run in one process on the same routing, over queued calls, in turn. These products reach the card's power
limit, where its clock depends on what ran before, so each round has a random order. The layout of the rows is made
before the clock starts, as it is once per layer in the model.

`--implementations mma,tiled,ragged_dot` compares these beside the default one. "ragged_dot" needs cuDNN 9.22 or newer:
with an older one XLA builds temporaries of [rows, experts, ...], gigabytes of them from 8,192 tokens on.
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
from jaxmoe.errors import UserError
from jaxmoe.ops.implementations import OPERATIONS, choose
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


def measure(tokens: int, names: list[str], peer: bool, rest: float = 0.0) -> list[dict[str, Any]]:
    """One record per product: TFLOP/s of each side, and each implementation's relative error against float32."""
    config = PRESETS["qwen3-30b-a3b"]
    D, F, E, k = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    experts = skewed_experts(tokens, E, k)
    sizes = np.bincount(experts.reshape(-1), minlength=E)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5, static_argnums=1)
    keys = jax.random.split(jax.random.key(0), 6)
    stacks = {"gate_up": draw(keys[0], (E, 2 * F, D)), "down": draw(keys[1], (E, D, F))}
    records = []
    for n, (product, (which, inner, out, transposed)) in enumerate(products(D, F).items()):
        rows, weight = draw(keys[2 + n], (tokens * k, inner)), stacks[which]
        flops = 2 * tokens * k * inner * out
        ours = {name: _ours(name, rows, weight, experts, transposed) for name in names}
        sides = {name: side for name, (side, _) in ours.items()}
        if peer:
            sides["torch"] = _torch(rows, experts, weight, sizes, transposed)
        sides["one matrix"] = _one_matrix(rows, weight[0], transposed)
        seconds = seconds_in_turn(sides, rest=rest)
        record: dict[str, Any] = {"tokens": tokens, "product": product, "skew": float(sizes.max() / sizes.mean())}
        record |= {f"{side} TFLOP/s": flops / taken / 1e12 for side, taken in seconds.items()}
        record |= {f"{name} error": error for name, (_, error) in ours.items()}
        if peer:
            record["ratio"] = seconds["torch"] / seconds[names[0]]
        records.append(record)
    return records


def _ours(name: str, rows: jax.Array, weight: jax.Array, experts: np.ndarray, transposed: bool) -> tuple[Side, float]:
    """One of our implementations, and its relative error."""
    kernel = OPERATIONS["grouped_matmul"][name].load()
    layout = (kernel.tile_rows(experts.size, len(weight)), kernel.span_rows(experts.size, len(weight)))
    schedule = jax.jit(make_schedule, static_argnums=(1, 2, 3))(jnp.asarray(experts), len(weight), *layout)
    x = jax.jit(padded)(rows, schedule)

    @jax.jit
    def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
        return kernel.matmul(x, weight, schedule, 0, transposed=transposed)

    error = _error(multiply(x, weight), x, weight, schedule, transposed)
    return Side(lambda: multiply(x, weight), jax.block_until_ready), error


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


def _torch(rows: jax.Array, experts: np.ndarray, weight: jax.Array, sizes: np.ndarray, transposed: bool) -> Side:
    """torch._grouped_mm on the same rows, sorted by expert, without padding."""
    import torch

    order = np.argsort(experts.reshape(-1), kind="stable")
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
    implementations = "grouped matmuls to compare: " + ", ".join(OPERATIONS["grouped_matmul"])
    parser.add_argument(
        "--implementations", metavar="NAME,...", help=f"{implementations} (default: the one that runs here)"
    )
    parser.add_argument("--peers", choices=("torch", "none"), default="torch", help="compare with PyTorch, or not")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    names = args.implementations.split(",") if args.implementations else [choose("grouped_matmul", "bfloat16").name]
    if unknown := [name for name in names if name not in OPERATIONS["grouped_matmul"]]:
        raise UserError(f"--implementations: expected names among {implementations.split(': ')[1]}; found {unknown[0]}")
    peers = ["torch"] if args.peers == "torch" else []
    sides, records = [*names, *peers, "one matrix"], []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: useful TFLOP/s, with the implementations' errors")
    print(
        f"{'tokens':>7} {'product':<8}" + "".join(f" {side:>11}" for side in sides) + f" {'ratio':>6} {'load':>6} error"
    )
    for tokens in map(int, args.tokens.split(",")):
        for r in measure(tokens, names, bool(peers), args.rest):
            records.append(r)
            numbers = "".join(f" {r[f'{side} TFLOP/s']:>11.1f}" for side in sides)
            errors = ", ".join(f"{r[f'{name} error']:.1e}" for name in names)
            print(
                f"{tokens:>7} {r['product']:<8}{numbers} {r.get('ratio', 0):>6.2f} {r['skew']:>6.2f} {errors}",
                flush=True,
            )
    write_json(args.json, {"device": jax.devices()[0].device_kind, "records": records})


if __name__ == "__main__":
    run(main)
