"""Compares two captures of one text, or the domains of one capture."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from captures import Capture
from jaxmoe.cli.arguments import say
from jaxmoe.errors import UserError
from jaxmoe.routing.commands.tables import print_table, write_csv
from jaxmoe.store.files import check_output_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    captures = "one capture (compares its domains) or two"
    parser.add_argument("captures", type=pathlib.Path, nargs="+", metavar="CAPTURE", help=captures)
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help="also write the table to this CSV file (docs/routing.md explains its columns)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Does what the flags say."""
    if arguments.out is not None:
        check_output_file(arguments.out)
    from jaxmoe.routing.compare import compare, compare_domains

    captures = [Capture.open(folder) for folder in arguments.captures]
    if len(captures) > 2:
        raise UserError(f"compare: expected one capture or two, found {len(captures)}")
    if len(captures) == 1:
        drifts = compare_domains(captures[0])
        header = "layer first second divergence low high floor correlation expert share_first share_second".split()
        body: list[list[Any]] = [[*drift[:3], *drift.divergence, *drift[4:]] for drift in drifts]
        say(f"{captures[0].folder}: {captures[0].tokens:,} tokens; how far the domains' expert loads differ, in nats")
    else:
        found = compare(*captures)
        header, body = found.table()
        any_layer = found.flipped_tokens
        say(f"{found.a.folder} against {found.b.folder}: {found.tokens:,} tokens")
        first, second = (each.source.get("dtype") for each in (found.a, found.b))
        if None not in (first, second) and first != second:
            say(f"computed in {first} and in {second}, so a part of the difference is rounding (--dtype)")
        say(
            f"{any_layer.value:.3%} of tokens [{any_layer.low:.3%}, {any_layer.high:.3%}] use different experts "
            "in at least one layer"
        )
        say(
            f"mean over layers: flips {found.pooled('flip_rate'):.4%}, overlap {found.pooled('overlap'):.4%}, "
            f"divergence {found.pooled('divergence'):.3g} nats"
        )
        if found.loss_change is not None:
            change = found.loss_change
            say(f"loss {found.loss_a:.4f} nats, change {change.value:+.5f} [{change.low:+.5f}, {change.high:+.5f}]")
        if len(found.first_margins):
            say(
                f"margin (in probability) of a token's first flip: median {_median(found.first_margins):.2g}, "
                f"largest {found.first_margins.max():.2g}"
            )
    print_table(header, body)
    if arguments.out is not None:
        write_csv(arguments.out, header, body)


def _median(values: Any) -> float:
    import numpy as np

    return float(np.median(values))
