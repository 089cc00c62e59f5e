"""The experts' products with weights in NF4, three ways: `python -m benchmarks.nf4_products`.

The shape is that of Qwen3-30B-A3B, with random codes and skewed routing. "16 bit" multiplies weights that were decoded
before, "decoded" decodes a layer's experts for each product, and the others decode in the kernel, with tiles of so
many columns and rows. All run in turn in one process. With `--low-rank` each product has the term of an adapter.
"error" is the worst relative one against "decoded"; with equal bits it is zero.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.grouped_matmul import padded, skewed_experts
from benchmarks.shapes import write_json
from benchmarks.timing import Side, seconds_in_turn
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.nf4.codec import dynamic_map
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.grouped_matmul import LowRankTerm
from jaxmoe.ops.kernels.grouped_matmul import hopper_decoding, hopper_nf4
from jaxmoe.ops.kernels.grouped_matmul.hopper import HOPPER
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import Tiles
from jaxmoe.ops.schedule import make_schedule
from jaxmoe.presets import PRESETS

PRODUCTS = ("up", "up, SwiGLU", "down", "dX up", "dX down")
LAYERS = 2  # in a stack; the second is multiplied
TILES = {
    "256 x 128": Tiles(256, (64, 96, 128), 6),
    "128 x 256": Tiles(128, (64, 128, 192, 256), 4),
    "from 128": Tiles(128, (128, 192, 224, 256), 4),
    "128 x 128": Tiles(128, (32, 64, 96, 128), 8),
    "256 x 64": Tiles(256, (32, 64), 8),
}


def random_stack(key: jax.Array, experts: int, matrices: int, out: int, inner: int) -> NF4Stack:
    """Random codes of all matrices, doubly quantised; `out` is that of all matrices of a group together."""
    groups, elements = LAYERS * experts, out * inner // matrices
    blocks = elements // 64
    bits = lambda key, n: jax.random.bits(key, (groups, matrices, n), jnp.uint8)
    first, second = jax.random.split(key)
    outer = jnp.full((groups, matrices, -(-blocks // 256)), 0.01, jnp.float32)
    offset = jnp.full((groups, matrices), 0.04, jnp.float32)
    shape = (groups, out, inner)
    table = jnp.asarray(dynamic_map())
    return NF4Stack(
        bits(first, elements // 2), bits(second, blocks), outer, offset, table, shape, jnp.dtype(jnp.bfloat16)
    )


class Case(NamedTuple):
    """One line of the table: the sides, not yet compiled, with what they are called with, and the rows that count."""

    tokens: int
    product: str
    sides: dict[str, tuple[Any, tuple[Any, ...]]]
    used: np.ndarray


def random_term(key: jax.Array, experts: int, rows: int, width: int, *, transposed: bool) -> LowRankTerm:
    """The low-rank term of a product of this width."""
    first, second = jax.random.split(key)
    shape = (experts, width, hopper_decoding.RANK) if transposed else (experts, hopper_decoding.RANK, width)
    normal = partial(jax.random.normal, dtype=jnp.bfloat16)
    return LowRankTerm(normal(first, (rows, hopper_decoding.RANK)), 0.05 * normal(second, shape))


def cases(tokens: int, products: Sequence[str], *, low_rank: bool) -> Iterator[Case]:
    """The cases of this many tokens."""
    config = PRESETS["qwen3-30b-a3b"]
    D, F, E, k = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    mean = tokens * k // E
    tiles = {label: tiles for label, tiles in TILES.items() if mean // 4 <= tiles.heights[-1] <= 4 * mean + 64}
    heights = tuple(sorted({128, *(each.heights[-1] for each in tiles.values())}))
    experts = jnp.asarray(skewed_experts(tokens, E, k))
    schedule = jax.jit(make_schedule, static_argnums=(1, 2, 3))(experts, E, 16, heights)
    for name in products:
        transposed, swiglu = not name.startswith("dX"), "SwiGLU" in name
        key = jax.random.key(0)
        stack = random_stack(key, E, 1, D, F) if "down" in name else random_stack(key, E, 2, 2 * F, D)
        width = stack.shape[2 if transposed else 1]
        x = padded(jax.random.normal(key, (tokens * k, width), jnp.bfloat16), schedule)

        low = None
        if low_rank:
            low = random_term(key, E, x.shape[0], stack.shape[1 if transposed else 2], transposed=transposed)
        options: dict[str, Any] = {"transposed": transposed, "swiglu": swiglu}

        def multiply(x, weight, schedule, offset, low, options=options):
            if isinstance(weight, NF4Stack):
                weight, offset = weight[offset + jnp.arange(E)], 0
            return HOPPER.matmul(x, weight, schedule, offset, low=low, **options)

        def in_kernel(x, stack, schedule, offset, low, options=options, tiles: Any = None):
            codes, spans = hopper_nf4.coded(stack, offset, E), schedule.spans[tiles.heights[-1]]
            form = hopper_nf4.NF4_FORM
            return hopper_decoding.grouped_matmul(x, codes, form, spans, offset, low=low, tiles=tiles, **options)

        plain = jax.jit(lambda stack: stack[E + jnp.arange(E)])(stack)
        sides = {
            "16 bit": (multiply, (x, plain, schedule, jnp.int32(0), low)),
            "decoded": (multiply, (x, stack, schedule, jnp.int32(E), low)),
        }
        for label, each in tiles.items():
            if each.columns == (256 if swiglu else 128) or (transposed and not swiglu):
                sides[label] = partial(in_kernel, tiles=each), (x, stack, schedule, jnp.int32(E), low)
        yield Case(tokens, name, sides, np.flatnonzero(np.asarray(schedule.source) >= 0))


def measure(case: Case, compiled: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Microseconds of each side, and the kernels' relative error against "decoded"; zero if all bits are equal."""
    calls = {label: partial(compiled[label], *arguments) for label, (_, arguments) in case.sides.items()}
    rows = lambda label: np.asarray(calls[label]()[case.used].astype(jnp.float32))
    expected = rows("decoded")
    record: dict[str, Any] = {"tokens": case.tokens, "product": case.product}
    for label in calls.keys() - {"decoded", "16 bit"}:
        record[f"{label}: error"] = float(np.linalg.norm(rows(label) - expected) / np.linalg.norm(expected))
    sides = {label: Side(call, jax.block_until_ready) for label, call in calls.items()}
    return record | {label: taken * 1e6 for label, taken in seconds_in_turn(sides, rounds=rounds).items()}


def main() -> None:
    """Measures and prints the table."""
    parser = ArgumentParser(description="The experts' products with weights in NF4.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 2048, 512, 128], metavar="N")
    parser.add_argument(
        "--products", nargs="+", default=PRODUCTS, choices=PRODUCTS, help="of the experts (default: all)"
    )
    parser.add_argument("--low-rank", action="store_true", help="with the term of an adapter; not with SwiGLU")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="of which the median counts (default: 8)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    products = [name for name in args.products if not (args.low_rank and "SwiGLU" in name)]
    every = [case for tokens in args.tokens for case in cases(tokens, products, low_rank=args.low_rank)]
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(_compiled, every))
    labels, records = ["16 bit", "decoded", *TILES], []
    print(f"{jax.devices()[0].device_kind}: microseconds")
    print(f"{'tokens':>7} {'product':<11}" + "".join(f"{label:>11}" for label in labels))
    for case, programs in zip(every, compiled, strict=True):
        records.append(found := measure(case, programs, args.rounds))
        numbers = "".join(f"{found[label]:11.1f}" if label in found else f"{'':11}" for label in labels)
        worst = max(found.get(f"{label}: error", 0.0) for label in TILES)
        print(f"{case.tokens:>7} {case.product:<11}{numbers}  error {worst:.1e}", flush=True)
    write_json(args.json, {"device": jax.devices()[0].device_kind, "records": records})


def _compiled(case: Case) -> dict[str, Any]:
    return {label: jax.jit(f).lower(*arguments).compile() for label, (f, arguments) in case.sides.items()}


if __name__ == "__main__":
    run(main)
