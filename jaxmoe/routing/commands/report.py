"""Writes an HTML page of figures about captures."""

from __future__ import annotations

import argparse
import pathlib

from captures import Capture
from jaxmoe.cli.arguments import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    captures = "the first is described; the others are compared with it"
    parser.add_argument("captures", type=pathlib.Path, nargs="+", metavar="CAPTURE", help=captures)
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")
    parser.add_argument("--tokenizer", type=pathlib.Path, metavar="DIR", help="model folder; shows tokens as text")
    parser.add_argument("--effects", type=pathlib.Path, metavar="FILE", help="also show this CSV file of `effects`")


def run(arguments: argparse.Namespace) -> None:
    """Does what the flags say."""
    from jaxmoe.routing.report import write_report

    tokenizer = None
    if arguments.tokenizer is not None:
        from jaxmoe.data.chat import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
    captures = [Capture.open(folder) for folder in arguments.captures]
    figures = write_report(captures, arguments.out, tokenizer=tokenizer, effects=arguments.effects)
    say(f"{arguments.out}/index.html: {figures} figures, each also as PNG and CSV")
