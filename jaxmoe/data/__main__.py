"""The command `python -m jaxmoe.data show`: data as a model sees it."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import pathlib
import sys
from collections.abc import Sequence

from rich.console import Console

from jaxmoe.cli.arguments import ArgumentParser, program_name, run, say, whole_number
from jaxmoe.cli.notices import shown_notices
from jaxmoe.cli.progress import progress
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data import chat_flags
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.chat_flags import chat_settings, notices
from jaxmoe.data.inputs import opened
from jaxmoe.data.overview import Example, Overview, examples, overview
from jaxmoe.data.records import Tokenising
from jaxmoe.data.show import figures, print_overview
from jaxmoe.data.sources import sources
from jaxmoe.errors import UserError
from jaxmoe.figures.html_page import page
from jaxmoe.store.files import output_file

_MOST_RECORDS = 100
_MOST_TOKENS = 2000  # of a record, in the page


def build_parser() -> ArgumentParser:
    """The flags of `python -m jaxmoe.data`."""
    parser = ArgumentParser(description="What a model sees of data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "show the first records as the model sees them, with counts, lengths, what is cut off and wasted"
    show = commands.add_parser("show", help=text, description=f"{text.capitalize()}.", prog=f"{program_name()} show")
    add = show.add_argument
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="HF folder or converted folder")
    add("--data", nargs="+", required=True, metavar="SOURCE", help="files, folders or data sets of the hub")
    add("--split", metavar="NAME", help="part of a folder of datasets or of a data set (default: train)")
    add("--pairs", action="store_true", help="the records are pairs of answers, for --loss dpo and orpo")
    add("--seq-length", type=whole_number, default=1024, metavar="N", help="tokens per sequence (default: 1024)")
    add("--records", type=whole_number, default=3, metavar="N", help="how many records to show (default: 3)")
    add("--tokens", type=whole_number, default=300, metavar="N", help="tokens shown of each (default: 300)")
    add("--limit", type=whole_number, metavar="N", help="read only the first N records of each source")
    add("--html", type=pathlib.Path, metavar="FILE", help="also write a page")
    chat_flags.add_arguments(show, "in conversations")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the command and runs it."""
    arguments = build_parser().parse_args(argv)
    with shown_notices(on_stderr=True):
        _show(arguments)


def _show(arguments: argparse.Namespace) -> None:
    for name, most in (("seq_length", 2**31), ("records", _MOST_RECORDS), ("tokens", 2**31), ("limit", 2**31)):
        if (value := getattr(arguments, name)) is not None and not 1 <= value <= most:
            raise UserError(f"{name}: expected a number from 1 to {most:,}, found {value:,}")
    if arguments.html is not None and arguments.html.is_dir():
        raise UserError(f"{arguments.html}: expected a file to write, found a folder")
    config = Qwen3MoeConfig.from_pretrained(arguments.model)
    tokenizer = load_tokenizer(arguments.model)
    settings = chat_settings(tokenizer, arguments.system, arguments.thinking, arguments.template_arg)
    how = Tokenising(tokenizer, config.vocab_size, settings, arguments.pairs)
    found = sources(tuple(arguments.data), "data")
    inputs = [opened(each.name, arguments.split, streaming=arguments.limit is not None) for each in found]
    shown = [
        example
        for each in inputs
        for example in examples(each, how, arguments.seq_length, arguments.records, arguments.tokens)
    ]
    with progress("reading", on_stderr=True) as show:
        numbers = overview(
            inputs,
            how,
            arguments.seq_length,
            arguments.limit,
            lambda done, total, records: show(done, total or 0, f"{records:,} records"),
        )
    for line in notices(settings, tokenizer):
        print(line, file=sys.stderr)
    print_overview(Console(highlight=False, soft_wrap=False), shown, numbers)
    if arguments.html is not None:
        pages = [
            example
            for each in inputs
            for example in examples(each, how, arguments.seq_length, arguments.records, _MOST_TOKENS)
        ]
        _write_page(arguments.html, [each.name for each in inputs], pages, numbers)


def _write_page(path: pathlib.Path, names: Sequence[str], shown: Sequence[Example], numbers: Overview) -> None:
    title = f"Data: {', '.join(names)}"
    without = "The page's script shows the records."
    text = page(title, ("", ""), numbers.table(), figures(shown, numbers), without_script=without)
    with output_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
    say(f"wrote {path}")


if __name__ == "__main__":
    run(main)
