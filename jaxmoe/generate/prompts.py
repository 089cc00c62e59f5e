"""Prompts as token ids: plain text, or a question in the checkpoint's chat template; and the flags that say which."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from typing import Any, NoReturn

from jaxmoe.data.chat import check_template, prompt_tokens, text_field
from jaxmoe.errors import UserError

_THINKING = "enable_thinking"
# Parameters of transformers' `apply_chat_template` that reach the template; a value of another one would not.
_FREE = {"tools", "documents"}
_OWN = {"messages", "self", "kwargs", "tokenizer_kwargs"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for prompts: `--prompt`, `--chat`, `--system`, `--no-thinking` and `--template-arg`."""
    add = parser.add_argument
    add("--prompt", action="append", required=True, metavar="TEXT", help="text to continue; may be repeated")
    add("--chat", action="store_true", help="put each prompt into the checkpoint's chat template")
    add("--system", metavar="TEXT", help="with --chat: system message before each prompt")
    add("--no-thinking", action="store_true", help=f"with --chat: the same as --template-arg {_THINKING}=false")
    text = "with --chat: argument of the chat template; VALUE is JSON or a plain word; may be repeated"
    add("--template-arg", action="append", default=[], metavar="KEY=VALUE", help=text)


def encode_prompts(arguments: argparse.Namespace, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """The token ids of every prompt, and notices for the user.

    Raises:
        UserError: text that is not Unicode, flags of `--chat` without it, a bad `--template-arg`, no chat template, or
            one that fails.
    """
    for text in arguments.prompt:
        text_field({"prompt": text}, "prompt")
    if arguments.system is not None:
        text_field({"system": arguments.system}, "system")
    if not arguments.chat:
        for flag in ("system", "no_thinking", "template_arg"):
            if getattr(arguments, flag) not in (None, False, []):
                raise UserError(f"{flag.replace('_', '-')}: expected together with --chat, found no --chat")
        return [tokenizer(text)["input_ids"] for text in arguments.prompt], []
    check_template(tokenizer, f"chat: {arguments.model}", "leave out --chat")
    given = template_arguments(arguments, tokenizer)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    prompts = [
        prompt_tokens([*system, {"role": "user", "content": text}], tokenizer, given) for text in arguments.prompt
    ]
    template = tokenizer.get_chat_template(tools=given.get("tools"))
    unread = [name for name in given if not re.search(rf"\b{name}\b", template)]
    return prompts, [f"the chat template does not read {name}, which has no effect" for name in unread]


def template_arguments(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """The chat template's arguments that `--template-arg` and `--no-thinking` give.

    Raises:
        UserError: an argument in another form than KEY=VALUE, given twice, or set by the command itself.
    """
    taken = (_OWN | set(inspect.signature(tokenizer.apply_chat_template).parameters)) - _FREE
    pairs = [_pair(text) for text in arguments.template_arg]
    pairs += [(_THINKING, False)] if arguments.no_thinking else []
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in taken:
            raise UserError(f"template-arg: expected an argument of the chat template, found {name}, which is not free")
        if name in found:
            raise UserError(f"template-arg: expected one value of {name}, found two")
        found[name] = value
    return found


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise UserError(f"template-arg: expected KEY=VALUE, found {text!r}")
    return name, _value(value, name)


def _value(text: str, name: str) -> Any:
    """JSON, or a plain word as it is; what looks like a misspelt JSON value is an error, never a string."""

    def not_json(constant: str) -> NoReturn:
        raise UserError(
            f"template-arg: expected JSON (true, false, null, a finite number) for {name}, found {constant}"
        )

    try:
        return json.loads(text, parse_constant=not_json)
    except UserError:
        raise
    except (ValueError, RecursionError):
        pass
    if text in ("True", "False", "None") or text[:1] in tuple('{["'):
        not_json(text)
    return text
