"""Peak anonymous memory of hf2jax and jax2hf on checkpoints of several GiB: `python -m benchmarks.conversion_memory`.

The bound is twice the largest layer plus 1 GiB, for any depth. It needs Linux and, for the default sizes, about 16 GB
of disk, which is freed at the end.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from benchmarks.sides import anonymous_bytes
from convert.names import block_shapes, blocks_of
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.parameters import parameter_specs
from peers.make_checkpoint import make_checkpoint

GIB = 2**30
ITEM_BYTES = 2  # bfloat16
ROOT = pathlib.Path(__file__).resolve().parent.parent


def model(depth: int) -> Qwen3MoeConfig:
    """Layers of 0.52 GiB: the widths of Qwen3-30B-A3B with 56 experts and a small vocabulary."""
    return Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=2048,
        num_hidden_layers=depth,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=56,
        moe_intermediate_size=768,
    )


def elements(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of elements of all arrays."""
    return sum(map(math.prod, shapes.values()))


def peak_of(command: list[str]) -> tuple[int, float]:
    """(peak anonymous bytes, seconds) of a command, sampled every 5 ms."""
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return peak, time.monotonic() - start


def measure(depth: int, folder: pathlib.Path) -> bool:
    """Converts a model of `depth` layers both ways and prints a line for each; returns whether both met the bound."""
    config = model(depth)
    largest = max(elements(block_shapes(config, block)) for block in blocks_of(config)) * ITEM_BYTES
    total = elements({path: spec.shape for path, spec in parameter_specs(config).items()}) * ITEM_BYTES
    bound = 2 * largest + GIB
    hf, jax, back = folder / "hf", folder / "jax", folder / "back"
    make_checkpoint(hf, config, dtype="bfloat16", shards=depth // 2)
    kept = True
    for name, src, dst in (("hf2jax", hf, jax), ("jax2hf", jax, back)):
        peak, seconds = peak_of([sys.executable, "-m", "convert", name, str(src), str(dst)])
        shutil.rmtree(src)  # the next conversion needs the disk space
        kept &= peak < bound
        print(
            f"{name}  {depth:>6} layers  {total / GIB:>9.2f} GiB  {largest / GIB:>13.2f} GiB  {bound / GIB:>5.2f} GiB"
            f"  {peak / GIB:>5.2f} GiB  {seconds:>6.1f} s",
            flush=True,
        )
    shutil.rmtree(back)
    return kept


def main() -> None:
    """Prints the table; fails if a peak is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 14], help="layers of each model (default: 8 14)")
    parser.add_argument("--scratch", type=pathlib.Path, help="folder for the checkpoints (default: the system's)")
    args = parser.parse_args()
    print("command  layers         checkpoint  largest layer      bound       peak      time")
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="conversion-memory-") as folder:
        kept = [measure(depth, pathlib.Path(folder)) for depth in args.depths]
    sys.exit(0 if all(kept) else "a peak was above its bound")


if __name__ == "__main__":
    main()
