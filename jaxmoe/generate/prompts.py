"""Prompts as token ids: plain text, or a question in the checkpoint's chat template; and the flags that say which."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxmoe.cli.arguments import whole_number
from jaxmoe.data import chat_flags
from jaxmoe.data.chat import ChatSettings, check_template, prompt_tokens, text_field
from jaxmoe.errors import UserError

BATCH_SIZE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for prompts: where they come from, `--chat`, and those of `jaxmoe.data.chat_flags`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated")
    source.add_argument("--interactive", action="store_true", help="a chat in the terminal; /help lists its commands")
    text = 'answer the prompts in a JSONL file: {"prompt": TEXT} or {"messages": [...]} a line'
    source.add_argument("--prompts", type=pathlib.Path, metavar="FILE", help=text)
    add = parser.add_argument
    text = "with --prompts: write the answers here; the same command continues a file that is not complete"
    add("--out", type=pathlib.Path, metavar="FILE", help=text)
    text = f"with --prompts: how many are answered at once (default: {BATCH_SIZE})"
    add("--batch-size", type=whole_number, metavar="N", help=text)
    add("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    chat_flags.add_arguments(parser, "in chats")


def chat_settings(arguments: argparse.Namespace, tokenizer: Any) -> tuple[ChatSettings, list[str]]:
    """What is rendered with every conversation, and notices for the user.

    Raises:
        UserError: flags of one way of generating with another, flags of chats without one, what
            `chat_flags.chat_settings` raises, or a chat without a chat template.
    """
    for flag, given in {"out": arguments.out, "batch-size": arguments.batch_size}.items():
        if given is not None and not arguments.prompts:
            raise UserError(f"{flag}: only valid with --prompts")
    if arguments.prompts and arguments.out is None:
        raise UserError("prompts: expected together with --out, found no --out")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"batch-size: expected at least 1, found {arguments.batch_size}")
    chat = arguments.chat or arguments.interactive
    if not chat and not arguments.prompts:
        given = {"system": arguments.system is not None, "no-thinking": not arguments.thinking}
        for flag, is_given in (given | {"template-arg": bool(arguments.template_arg)}).items():
            if is_given:
                raise UserError(f"{flag}: expected together with --chat, found no --chat")
        return ChatSettings(), []
    if chat:
        flag, otherwise = ("chat", "leave out --chat") if arguments.chat else ("interactive", "use --prompt TEXT")
        check_template(tokenizer, f"{flag}: {arguments.model}", otherwise)
    settings = chat_flags.chat_settings(tokenizer, arguments.system, arguments.thinking, arguments.template_arg)
    return settings, chat_flags.notices(settings, tokenizer)


def encode_prompts(arguments: argparse.Namespace, tokenizer: Any, settings: ChatSettings) -> list[list[int]]:
    """The token ids of every `--prompt`.

    Raises:
        UserError: text that is not Unicode, or a chat template that fails.
    """
    for text in arguments.prompt:
        text_field({"prompt": text}, "prompt")
    if not arguments.chat:
        return [tokenizer(text)["input_ids"] for text in arguments.prompt]
    return [prompt_tokens([{"role": "user", "content": text}], tokenizer, settings) for text in arguments.prompt]


def check_context(tokens: Sequence[int], context: int) -> None:
    """Raises UserError if a prompt leaves no room for an answer in the model's context of so many tokens."""
    if len(tokens) >= context:
        limit = f"a prompt of fewer than {context:,} tokens, the model's context"
        raise UserError(f"expected {limit}, found {len(tokens):,}")
