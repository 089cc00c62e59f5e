"""Convert checkpoints and adapters between HF or PEFT and JAX, and show what a folder holds."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import contextlib
import ctypes
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from convert.adapters import SETTINGS, read_peft, write_peft
from convert.hf2jax import hf2jax, read_hf
from convert.hub import local_folder
from convert.jax2hf import jax2hf, parse_size
from convert.peft_experts import LAYOUTS
from convert.report import as_text, inspect, size_text
from jaxmoe.cli.arguments import ArgumentParser, path_name, run, say
from jaxmoe.cli.progress import progress
from jaxmoe.config import DTYPES, Qwen3MoeConfig, read_json
from jaxmoe.errors import UserError, counted
from jaxmoe.store.adapter import read_adapter, write_adapter
from jaxmoe.store.checkpoint import Block, Checkpoint
from jaxmoe.store.converted import is_converted, read_converted

_DEQUANTIZE = "decode FP8 weights to the dtype in config.json, NF4 weights to the dtype that they had before"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def build_parser() -> argparse.ArgumentParser:
    """The commands and their flags."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, source: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument("src", type=path_name, metavar="SRC", help=source)
        sub.add_argument("dst", type=path_name, metavar="DST", help="folder to write; must be new or empty")
        return sub

    sub = command("hf2jax", "convert an HF checkpoint into a converted folder", "HF folder or hub id")
    sub.add_argument("--dtype", choices=DTYPES, help="cast every tensor (default: each keeps its dtype)")
    sub.add_argument(
        "--quantize", choices=("nf4", "fp8"), help="store projections, dense MLPs and experts in 4 or 8 bits"
    )
    sub.add_argument("--strict", action="store_true", help="refuse a config.json with unknown fields")
    sub.add_argument(
        "--dequantize",
        action="store_true",
        help=_DEQUANTIZE,
    )
    sub = command("jax2hf", "convert a converted folder into an HF checkpoint", "converted folder")
    sub.add_argument("--adapter", type=path_name, metavar="DIR", help="adapter to merge, PEFT or converted")
    sub.add_argument(
        "--dequantize",
        action="store_true",
        help=_DEQUANTIZE,
    )
    sub.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest size of a safetensors file (default: 5GB)"
    )
    sub = command("peft2jax", "convert a PEFT adapter into a converted adapter", "PEFT adapter folder or hub id")
    sub.add_argument(
        "--model", type=path_name, metavar="DIR", help="base model, HF or converted (default: the one named in SRC)"
    )
    sub.add_argument(
        "--layout",
        "--packing",
        choices=LAYOUTS,
        help="layout of the experts' tensors (default: names, shapes and PEFT's version tell); peft: as PEFT writes "
        "it, 0.19 and later if no version is given; unsloth: lora_B as Unsloth wrote it before September 2026",
    )
    sub = command("jax2peft", "convert a converted adapter into a PEFT adapter", "converted adapter folder")
    sub.add_argument(
        "--layout",
        choices=("peft", "per-expert", "stacked"),
        default="peft",
        help="layout of the experts' tensors; per-expert: what vLLM and SGLang load, one adapter per expert and "
        "projection; stacked: one 3-D tensor per layer, for SGLang (default: peft)",
    )
    sub = commands.add_parser("inspect", help="show what a folder holds", description="Show what a folder holds.")
    sub.add_argument(
        "path",
        type=path_name,
        metavar="PATH",
        help="HF checkpoint, converted folder, PEFT adapter or converted adapter",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command in `argv` (default: the command line).

    Raises:
        UserError: bad input.
    """
    args = build_parser().parse_args(argv)
    # Orbax asks JAX for its devices. A conversion needs no GPU and must not occupy one. Set before JAX is first used.
    os.environ["JAX_PLATFORMS"] = "cpu"
    _give_memory_back(keep=args.command == "hf2jax" and args.quantize is not None)
    if args.command == "inspect":
        report = inspect(args.path)
        say(json.dumps(report, indent=2) if args.json else as_text(report))
    elif args.command == "hf2jax":
        src = local_folder(args.src)
        if args.strict:
            _refuse_unknown_fields(src / "config.json")
        with _progress(args.dst) as on_block:
            hf2jax(src, args.dst, args.dtype, args.quantize, on_block, args.dequantize)
    elif args.command == "jax2hf":
        size = parse_size(args.max_shard_size)
        with _progress(args.dst) as on_block:
            jax2hf(args.src, args.dst, args.adapter, size, args.dequantize, on_block)
    elif args.command == "peft2jax":
        src = local_folder(args.src)
        folder = _base_model(src, args.model)
        config = Qwen3MoeConfig.from_pretrained(folder)
        lora, adapters = read_peft(src, config, args.layout, _checkpoint(folder))
        write_adapter(args.dst, config, lora, adapters)
        say(f"{args.dst}: {len(adapters)} arrays")
    else:
        config, lora, adapters = read_adapter(args.src)
        write_peft(args.dst, config, lora, adapters, args.layout)
        say(f"{args.dst}: {len(adapters)} arrays")


def _refuse_unknown_fields(path: pathlib.Path) -> None:
    """Raises UserError if the config.json `path` has fields that are accepted without --strict, such as stamps."""
    if unknown := Qwen3MoeConfig.unknown_fields(read_json(path)):
        raise UserError(f"{path}: --strict: expected only known fields, found {', '.join(unknown)}")


def _base_model(adapter: pathlib.Path, given: str | None) -> pathlib.Path:
    name = given or read_json(adapter / SETTINGS).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{adapter / SETTINGS}: base_model_name_or_path: expected a model (or use --model), found {name!r}"
        )
    return local_folder(name, ("config.json",))


def _checkpoint(folder: pathlib.Path) -> Checkpoint | None:
    """The checkpoint in a model's folder; None if only its config is there, as for a model named by its hub id."""
    if is_converted(folder):
        return read_converted(folder)
    return read_hf(folder) if any(folder.glob("*.safetensors")) else None


@contextlib.contextmanager
def _progress(dst: str) -> Iterator[Callable[[Block, int], None]]:
    """Yields a function that reports progress, to be called after each block; prints a summary at the end."""
    start = time.monotonic()
    nbytes = layers = 0
    with progress(dst) as show:

        def on_block(block: Block, total: int) -> None:
            nonlocal nbytes, layers
            nbytes += sum(array.nbytes for array in block.arrays.values())
            layers += block.layer is not None
            show(layers, total, f"{layers} of {total} layers, {size_text(nbytes)}")

        yield on_block
    seconds = time.monotonic() - start
    say(f"{dst}: {counted(layers, 'layer')}, {size_text(nbytes)} in {seconds:.1f} s")


def _give_memory_back(keep: bool) -> None:
    """Makes glibc return memory to the system: blocks of 1 MiB and more are mapped separately and unmapped when freed.

    By default glibc raises that limit up to 32 MiB. Buffers of compression then leave holes in its heaps, and the peak
    of memory grows with the number of layers. With `keep` the limit is 8 MiB, and heaps keep up to 64 MiB: quantisation
    frees and allocates buffers of one matrix all the time, and new pages cost as much time as the quantisation itself.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # C libraries other than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_M_MMAP_THRESHOLD, 2**23 if keep else 2**20)
            if keep:
                mallopt(_M_TRIM_THRESHOLD, 2**26)


if __name__ == "__main__":
    run(main)
