"""Trains with two settings, once for each of several seeds, and compares the runs."""

from __future__ import annotations

import argparse
import pathlib
import sys

from jaxmoe.cli.arguments import say, whole_number
from jaxmoe.errors import UserError
from jaxmoe.routing.commands.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    settings = "settings of a training run, as for --config of jaxmoe.train; seed and output are not used"
    for name in ("a", "b"):
        parser.add_argument(name, type=pathlib.Path, metavar=f"{name.upper()}.toml", help=settings)
    seeds = "pairs of runs, with the seeds 0, 1, ... (default: 5)"
    parser.add_argument("--seeds", type=whole_number, default=5, metavar="N", help=seeds)
    folder = "folder for the runs, differences.csv and differences.html; the same command continues there"
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help=folder)


def run(arguments: argparse.Namespace) -> int | None:
    """Does what the flags say."""
    from jaxmoe.cli.arguments import flag_kinds
    from jaxmoe.cli.config_file import read_settings
    from jaxmoe.runs.paired import HEADER, PAGE_FILE
    from jaxmoe.train.paired import run_pairs
    from jaxmoe.train.settings import TrainConfig

    if arguments.seeds < 1:
        raise UserError(f"seeds: expected at least 1, found {arguments.seeds}")
    sides = {name: read_settings(getattr(arguments, name.lower()), flag_kinds(TrainConfig)) for name in "AB"}
    found, stopped_by = run_pairs(sides, arguments.seeds, arguments.out)
    if found:
        print_table(HEADER, [list(difference) for difference in found])
        say(f"wrote {arguments.out / PAGE_FILE}: {found[0].pairs} of {arguments.seeds} pairs")
    if stopped_by is None:
        return None
    print("stopped: the same command continues from here", file=sys.stderr)
    return 128 + stopped_by
