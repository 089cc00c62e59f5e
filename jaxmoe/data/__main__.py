"""The command `python -m jaxmoe.data show`: data as a model sees it."""

from __future__ import annotations

from jaxmoe import stopping

if __name__ == "__main__":
    stopping.watch()  # before the other imports, which take seconds

import argparse
import contextlib
import logging
import pathlib
from collections.abc import Sequence

from rich.console import Console

from jaxmoe.cli.arguments import ArgumentParser, program_name, run, say, whole_number
from jaxmoe.cli.notices import LOGGER, shown_notices
from jaxmoe.cli.progress import progress
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.data import chat_flags
from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.chat_flags import chat_settings, notices
from jaxmoe.data.inputs import check_split, opened
from jaxmoe.data.overview import Example, Overview, examples, overview
from jaxmoe.data.raw import Input
from jaxmoe.data.records import Tokenising
from jaxmoe.data.show import figures, print_overview
from jaxmoe.data.sources import sources
from jaxmoe.errors import UserError, counted
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
    check_split([each.name for each in found], arguments.split, "split")
    inputs = [opened(each.name, arguments.split, streaming=arguments.limit is not None) for each in found]
    with contextlib.ExitStack() as stack:
        # A page that cannot be written is an error before everything is read and printed.
        draft = None if arguments.html is None else stack.enter_context(output_file(arguments.html))
        numbers = _print(arguments, inputs, how, notices(settings, tokenizer))
        if draft is not None:
            _write_page(draft, inputs, _examples(arguments, inputs, how, _MOST_TOKENS), numbers)
    if draft is not None:
        say(f"wrote {arguments.html}")


def _examples(
    arguments: argparse.Namespace, inputs: Sequence[Input], how: Tokenising, most_tokens: int
) -> list[Example]:
    """The first records of each input."""
    return [
        example
        for each in inputs
        for example in examples(each, how, arguments.seq_length, arguments.records, most_tokens)
    ]


def _print(
    arguments: argparse.Namespace, inputs: Sequence[Input], how: Tokenising, about_template: Sequence[str]
) -> Overview:
    """Reads everything and prints it."""
    shown = _examples(arguments, inputs, how, arguments.tokens)
    with progress("reading", on_stderr=True) as show:
        numbers = overview(
            inputs,
            how,
            arguments.seq_length,
            arguments.limit,
            lambda done, total, records: show(done, total or 0, counted(records, "record")),
        )
    for line in about_template:
        logging.getLogger(LOGGER).info(line)
    print_overview(Console(highlight=False, soft_wrap=False), shown, numbers)
    return numbers


def _write_page(draft: pathlib.Path, inputs: Sequence[Input], shown: Sequence[Example], numbers: Overview) -> None:
    title = f"Data: {', '.join(each.name for each in inputs)}"
    without = "The page's script shows the records."
    text = page(title, ("", ""), numbers.table(), figures(shown, numbers), without_script=without)
    draft.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
