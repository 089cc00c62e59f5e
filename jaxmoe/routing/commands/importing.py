"""Makes a capture of the experts that an inference server returned."""

from __future__ import annotations

import argparse
import pathlib

from captures import tokenizer_digest
from jaxmoe.cli.arguments import say, whole_number
from jaxmoe.errors import UserError, counted
from jaxmoe.routing.commands.inputs import check_at_least_1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    from jaxmoe.data import chat_flags

    add = parser.add_argument
    add("responses", type=pathlib.Path, metavar="FILE", help="the server's responses as JSON (docs/routing.md)")
    add("--model", type=pathlib.Path, required=True, metavar="DIR", help="folder of the model that the server ran")
    data = "records that training will read, one for each response, in their order; other token ids are refused"
    add("--data", type=pathlib.Path, action="append", metavar="FILE", help=data)
    add("--split", metavar="NAME", help="part of a folder of datasets or of a data set of the hub (default: train)")
    add("--seq-length", type=whole_number, default=1024, metavar="N", help="most tokens per context (default: 1024)")
    chat_flags.add_arguments(parser, "in conversations of --data")
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write, new or empty")


def run(arguments: argparse.Namespace) -> None:
    """Does what the flags say."""
    from jaxmoe.config import Qwen3MoeConfig
    from jaxmoe.data.chat import AS_WRITTEN, load_tokenizer
    from jaxmoe.data.chat_flags import chat_settings
    from jaxmoe.routing.imported import import_experts
    from jaxmoe.routing.text import read_text

    check_at_least_1(arguments, "seq_length")
    config, tokenizer = Qwen3MoeConfig.from_pretrained(arguments.model), load_tokenizer(arguments.model)
    if not config.sparse_layers:
        raise UserError(f"{arguments.model}: expected a model with mixture-of-experts layers, found none")
    text, settings = None, chat_settings(tokenizer, arguments.system, arguments.thinking, arguments.template_arg)
    if arguments.data is None and (settings != AS_WRITTEN or arguments.split is not None):
        raise UserError("system, no-thinking, template-arg and split: only valid with data, found none")
    if arguments.data is not None:
        size, length = config.vocab_size, arguments.seq_length
        text = read_text(arguments.data, tokenizer, size, length, settings=settings, split=arguments.split)
    found = import_experts(arguments.responses, arguments.out, config, tokenizer_digest(tokenizer), text)
    sequences = len(found.read_text().contexts())
    say(f"{arguments.out}: {counted(found.tokens, 'token')} of {counted(sequences, 'sequence')}")
