"""Times products of routed rows with experts in FP8 against the same products in bfloat16, on one Hopper GPU.

    python -m benchmarks.fp8_products [--tokens 8192 32768] [--seconds 0.3] [--json FILE]

Widths are those of Qwen3-30B-A3B (128 experts, 8 per token, 2048 to 768), routing is random, weights are random. Each
line is the median time of a call, in milliseconds, and the bfloat16 kernel's time over it. "In registers" decodes the
weights in the kernel; "equal" says whether all bits are those of decoded weights. "FP8", forwards only, multiplies rows
in FP8; the error is the relative L2 of sampled rows against float64 on the same quantised operands.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.fp8 import encode
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.ops.fp8_products import QuantizedRows, quantize_rows
from jaxmoe.ops.kernels.grouped_matmul import hopper, hopper_decoding, hopper_e4m3, hopper_fp8
from jaxmoe.ops.kernels.grouped_matmul.hopper_tiles import Tiles
from jaxmoe.ops.schedule import Schedule, make_schedule
from jaxmoe.ops.swiglu import swiglu_of_product

EXPERTS, CHOSEN, HIDDEN, WIDTH = 128, 8, 2048, 768
REGISTERS = {
    "128 columns, spans of 256": Tiles(128, (128, 192, 224, 256), 4),
    "the same from 64": Tiles(128, (64, 128, 192, 256), 4),
    "256 columns": Tiles(256, (64, 96, 128), 5),
    "128 columns, spans of 128": Tiles(128, (32, 64, 96, 128), 7),
}
TILES = {
    "256 columns": hopper_fp8.TILES,
    "256 columns, three heights": Tiles(256, (96, 112, 128), 4),
    "128 columns": Tiles(128, (96, 112, 128), 5),
    "128 columns, spans of 160": Tiles(128, (128, 144, 160), 4),
    "128 columns, spans of 192": Tiles(128, (160, 176, 192), 4),
}


def milliseconds(run: Callable[..., Any], *operands: Any, seconds: float, jit: bool = True) -> float:
    """The median of several rounds of calls, each long enough that the host's part is hidden."""
    compiled = jax.jit(run) if jit else run
    jax.block_until_ready(compiled(*operands))
    start = time.perf_counter()
    jax.block_until_ready([compiled(*operands) for _ in range(3)])
    count = max(2, int(seconds / 5 / ((time.perf_counter() - start) / 3)))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            last = compiled(*operands)
        jax.block_until_ready(last)
        rounds.append((time.perf_counter() - start) / count)
    return 1000 * float(np.median(rounds))


def stack_of(key: jax.Array, matrices: int, out: int, inner: int) -> tuple[FP8Stack, jax.Array]:
    """(random experts in FP8, their decoded weights)."""
    weights = jax.random.normal(key, (EXPERTS * matrices, out // matrices, inner), jnp.bfloat16) * 0.02
    packed = encode.encode(list(np.asarray(weights)), (out // matrices, inner))
    codes = jnp.asarray(packed.codes).reshape(EXPERTS, out, inner)
    scales = jnp.asarray(packed.scales).reshape(EXPERTS, matrices, *packed.scales.shape[1:])
    held = FP8Stack(codes, scales, (EXPERTS, out, inner), jnp.dtype(jnp.bfloat16))
    return held, jax.jit(lambda held: held[jnp.arange(EXPERTS)])(held)


def error(found: Any, x: QuantizedRows, held: FP8Stack, schedule: Schedule, swiglu: bool) -> float:
    """Relative L2 of some rows against float64."""
    rows = np.flatnonzero(np.asarray(schedule.source) >= 0)
    rows = rows[np.linspace(0, len(rows) - 1, 64).astype(int)]
    experts = np.asarray(schedule.tile_expert)[rows // 16]
    codes = np.asarray(x.codes[rows]).astype(np.float64)
    left = codes * np.repeat(np.asarray(x.scales[rows], np.float64), 128, 1)
    expected = []
    for row, expert in zip(left, experts, strict=True):
        scales = np.asarray(held.scales[expert], np.float64).repeat(128, 1).repeat(128, 2)
        product = np.asarray(held.codes[expert]).astype(np.float64) * scales.reshape(held.shape[1:]) @ row
        if swiglu:
            gate, up = np.split(product, 2)
            product = gate / (1 + np.exp(-gate)) * up
        expected.append(product)
    exact = np.stack(expected)
    return float(np.linalg.norm(np.asarray(found[rows], np.float64) - exact) / np.linalg.norm(exact))


def in_registers(
    x: Any, held: FP8Stack, weights: Any, schedule: Schedule, *, transposed: bool, swiglu: bool = False
) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """(the kernel that decodes in registers with these tiles, its call, whether it has the bits of decoded weights)."""
    used = np.flatnonzero(np.asarray(schedule.source) >= 0)
    plain = lambda x, weights: hopper.HOPPER.matmul(x, weights, schedule, 0, transposed=transposed, swiglu=swiglu)
    expected = np.asarray(jax.jit(plain)(x, weights).astype(jnp.float32))[used]
    mean = schedule.destination.size // EXPERTS
    for how, tiles in REGISTERS.items():
        fused = swiglu and tiles.columns == 256
        if (not transposed and tiles.columns != 128) or not mean // 4 <= tiles.heights[-1] <= 4 * mean + 64:
            continue

        def run(x: Any, held: FP8Stack, tiles: Tiles = tiles, fused: bool = fused) -> Any:
            weight = hopper_e4m3.coded(held, 0, EXPERTS, transposed=transposed)
            spans: Any = schedule.spans[tiles.heights[-1]]
            options: Any = {"transposed": transposed, "swiglu": fused}
            y = hopper_decoding.grouped_matmul(x, weight, hopper_e4m3.E4M3_FORM, spans, tiles=tiles, **options)
            return swiglu_of_product(y) if swiglu and not fused else y

        call = partial(jax.jit(run), x, held)
        yield how, call, bool((np.asarray(call().astype(jnp.float32))[used] == expected).all())


def cases(tokens: int, seconds: float, names: Sequence[str] = tuple(TILES)) -> Iterator[dict[str, Any]]:
    """The lines for one number of tokens."""
    keys = jax.random.split(jax.random.key(0), 4)
    experts = jnp.argsort(jax.random.uniform(keys[0], (tokens, EXPERTS)), axis=1)[:, :CHOSEN].astype(jnp.int32)
    limits = {128, 160, 192, 256, *hopper.HOPPER.span_rows(experts.size, EXPERTS)}
    schedule = jax.jit(make_schedule, static_argnums=(1, 2, 3))(experts, EXPERTS, 16, tuple(sorted(limits)))
    rows = len(schedule.source)
    for name, matrices, out, inner in (("up", 2, 2 * WIDTH, HIDDEN), ("down", 1, HIDDEN, WIDTH)):
        held, weights = stack_of(keys[1], matrices, out, inner)
        x = jax.random.normal(keys[2], (rows, inner), jnp.bfloat16)
        d_y = jax.random.normal(keys[3], (rows, out), jnp.bfloat16)
        line = {"tokens": tokens, "product": name}
        quantized = jax.jit(quantize_rows)(x)
        yield line | {"what": "quantise rows", "ms": milliseconds(quantize_rows, x, seconds=seconds)}
        decode = lambda held: held[jnp.arange(EXPERTS)]
        yield line | {"what": "decode to bfloat16", "ms": milliseconds(decode, held, seconds=seconds)}
        for swiglu in (False, True) if name == "up" else (False,):
            kind = line | {"what": "forward, swiglu" if swiglu else "forward"}
            forward = lambda x, w, swiglu=swiglu: hopper.HOPPER.matmul(
                x, w, schedule, 0, transposed=True, swiglu=swiglu
            )
            base = milliseconds(forward, x, weights, seconds=seconds)
            yield kind | {"how": "bfloat16", "ms": base, "times": 1.0}
            inside = in_registers(x, held, weights, schedule, transposed=True, swiglu=swiglu)
            for how, call, equal in inside:
                ms = milliseconds(call, seconds=seconds, jit=False)
                yield kind | {"how": f"in registers, {how}", "ms": ms, "times": base / ms, "equal": equal}
            for how in names:
                tiles = TILES[how]
                if swiglu and tiles.columns < 256:
                    continue
                run = lambda x, held, tiles=tiles, swiglu=swiglu: hopper_fp8.grouped_matmul(
                    x, held, schedule.spans[tiles.heights[-1]], swiglu=swiglu, tiles=tiles
                )
                try:
                    found = error(jax.jit(run)(quantized, held), quantized, held, schedule, swiglu)
                    ms = milliseconds(run, quantized, held, seconds=seconds)
                except Exception as problem:
                    yield kind | {"how": how, "failed": str(problem)[:300]}
                    continue
                yield kind | {"how": f"FP8, {how}", "ms": ms, "times": base / ms, "error": found}
        backward = lambda d_y, w: hopper.HOPPER.matmul(d_y, w, schedule, 0, transposed=False)
        kind = line | {"what": "dX"}
        base = milliseconds(backward, d_y, weights, seconds=seconds)
        yield kind | {"how": "bfloat16", "ms": base, "times": 1.0}
        ms = milliseconds(backward, d_y, held, seconds=seconds)
        yield kind | {"how": "decoded, then bfloat16", "ms": ms, "times": base / ms}
        for how, call, equal in in_registers(d_y, held, weights, schedule, transposed=False):
            ms = milliseconds(call, seconds=seconds, jit=False)
            yield kind | {"how": f"in registers, {how}", "ms": ms, "times": base / ms, "equal": equal}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each call is measured, about")
    parser.add_argument("--tiles", nargs="+", default=list(TILES), choices=list(TILES), help="sizes of FP8's tiles")
    parser.add_argument("--json", type=pathlib.Path, help="also write the lines to this file")
    arguments = parser.parse_args(argv)
    found = []
    for tokens in arguments.tokens:
        for line in cases(tokens, arguments.seconds, arguments.tiles):
            found.append(line)
            print(
                " ".join(
                    f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
                    for key, value in line.items()
                ),
                flush=True,
            )
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
