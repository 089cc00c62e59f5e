"""Prompts as token ids: plain text, or a question in the checkpoint's chat template; and the flags that say which."""

from __future__ import annotations

import argparse
from typing import Any

from jaxmoe.data import chat_flags
from jaxmoe.data.chat import check_template, prompt_tokens, text_field
from jaxmoe.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for prompts: `--prompt`, `--chat`, and those of `jaxmoe.data.chat_flags`."""
    add = parser.add_argument
    add("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; may be repeated")
    add("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    chat_flags.add_arguments(parser, "with --chat")


def encode_prompts(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """The token ids of every prompt, and notices for the user.

    Raises:
        UserError: text that is not Unicode, flags of `--chat` without it, what `chat_flags.chat_settings` raises, no
            chat template, or one that fails.
    """
    for text in arguments.prompt:
        text_field({"prompt": text}, "prompt")
    if not arguments.chat:
        given = {"system": arguments.system is not None, "no-thinking": not arguments.thinking}
        for flag, is_given in (given | {"template-arg": bool(arguments.template_arg)}).items():
            if is_given:
                raise UserError(f"{flag}: expected together with --chat, found no --chat")
        return [tokenizer(text)["input_ids"] for text in arguments.prompt], []
    check_template(tokenizer, f"chat: {arguments.model}", "leave out --chat")
    settings = chat_flags.chat_settings(tokenizer, arguments.system, arguments.thinking, arguments.template_arg)
    prompts = [prompt_tokens([{"role": "user", "content": text}], tokenizer, settings) for text in arguments.prompt]
    return prompts, chat_flags.notices(settings, tokenizer)
