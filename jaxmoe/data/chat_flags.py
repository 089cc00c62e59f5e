"""The flags of every command that renders conversations: a system message and arguments of the chat template."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxmoe.data.chat import AS_WRITTEN, ChatSettings, check_objects, check_template, text_field
from jaxmoe.errors import UserError

THINKING = "enable_thinking"
# Parameters of transformers' `apply_chat_template` that reach the template; a value of another one would not.
_FREE = {"tools", "documents"}
_OWN = {"messages", "self", "kwargs", "tokenizer_kwargs"}
HELP = {
    "system": "system message of every conversation that has none",
    "thinking": f"--no-thinking is the same as --template-arg {THINKING}=false",
    "template_arg": "argument of the chat template; VALUE is JSON or a plain word; may be repeated",
}


def add_arguments(parser: argparse.ArgumentParser, where: str) -> None:
    """Adds `--system`, `--no-thinking` and `--template-arg`; `where` starts their help and says when they apply."""
    add = parser.add_argument
    add("--system", metavar="TEXT", help=f"{where}: {HELP['system']}")
    same = f"the same as --template-arg {THINKING}=false"
    add("--no-thinking", dest="thinking", action="store_false", help=f"{where}: {same}")
    add(
        "--template-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"{where}: {HELP['template_arg']}",
    )


def chat_settings(tokenizer: Any, system: str | None, thinking: bool, pairs: Sequence[str]) -> ChatSettings:
    """What the flags ask for: `pairs` are the values of `--template-arg`.

    Raises:
        UserError: text that is not Unicode, an argument in another form than KEY=VALUE, given twice, of another type or
            set by the command itself, or flags for a tokenizer without a chat template.
    """
    if system is not None:
        text_field({"system": system}, "system")
    settings = ChatSettings(system, _template_arguments(tokenizer, thinking, pairs))
    if settings != AS_WRITTEN:
        check_template(tokenizer, "system, no-thinking and template-arg", "leave these flags out")
    for name in ("tools", "documents"):
        check_objects(settings.arguments.get(name), name)
    return settings


def notices(settings: ChatSettings, tokenizer: Any) -> list[str]:
    """A line for each argument that the chat template does not read."""
    if not settings.arguments:
        return []
    template = tokenizer.get_chat_template(tools=settings.arguments.get("tools"))
    unread = [name for name in settings.arguments if not re.search(rf"\b{name}\b", template)]
    return [f"the chat template does not read {name}, which has no effect" for name in unread]


def _template_arguments(tokenizer: Any, thinking: bool, texts: Sequence[str]) -> dict[str, Any]:
    taken = (_OWN | set(inspect.signature(tokenizer.apply_chat_template).parameters)) - _FREE
    pairs = [_pair(text) for text in texts] + ([] if thinking else [(THINKING, False)])
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
