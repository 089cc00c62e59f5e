"""Flags for the model that a benchmark measures: a published shape, with fewer layers or tiny widths on request."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.presets import PRESETS


def add_arguments(parser: argparse.ArgumentParser, *, width: bool = True) -> None:
    """Adds the flags that `config_of` reads, and `--json`; `--width` only if asked for."""
    parser.add_argument(
        "--preset",
        default="qwen3-30b-a3b",
        choices=sorted(PRESETS),
        metavar="NAME",
        help=f"one of {', '.join(PRESETS)}",
    )
    parser.add_argument("--layers", type=int, metavar="N", help="use this many layers (default: the preset's)")
    if width:
        parser.add_argument("--width", type=int, metavar="N", help="use a tiny model, to try out the benchmark")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers to this file")


def config_of(args: argparse.Namespace) -> Qwen3MoeConfig:
    """The config that the flags describe."""
    config = PRESETS[args.preset]
    if args.layers:
        config = config.replace(num_hidden_layers=args.layers)
    if width := getattr(args, "width", None):
        config = config.replace(hidden_size=width, moe_intermediate_size=64, num_experts=16, vocab_size=512)
    return config


def write_json(path: pathlib.Path | None, record: Any) -> None:
    """Writes the numbers if `--json` asks for them."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
