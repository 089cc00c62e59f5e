"""A file of prompts: each record is text to continue, or a conversation that the assistant is to continue."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmoe.data.chat import ChatSettings, check_messages, check_template, kind_of, prompt_tokens, text_field
from jaxmoe.data.inputs import opened
from jaxmoe.data.record_forms import as_messages
from jaxmoe.errors import UserError
from jaxmoe.generate.prompts import check_context
from jaxmoe.json_text import without_nan

KINDS = '"prompt", or "messages" (and "tools")'


class FilePrompt(NamedTuple):
    """One prompt: the fields of its line, and its token ids."""

    fields: dict[str, Any]
    tokens: list[int]


def read_prompts(
    path: pathlib.Path, tokenizer: Any, vocab_size: int, chat: bool, settings: ChatSettings, context: int
) -> list[FilePrompt]:
    """The prompts of a file, in its order; blank lines are skipped.

    A line is `{"prompt": TEXT}` or `{"messages": [...]}`, optionally with `"tools"`; other fields are kept and not
    read. Messages are rendered with the chat template and `settings`, and so are prompts if `chat`.

    Raises:
        UserError: no such file, no prompt in it, a line that is none, or a prompt that fills the model's `context`; the
            message starts with FILE:LINE.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a file of prompts, found a folder")
    prompts = []
    for where, value, *_ in opened(path).read(0):
        try:
            value = without_nan(value)
            prompt = FilePrompt(value, _tokens(value, tokenizer, vocab_size, chat, settings))
            check_context(prompt.tokens, context)
            prompts.append(prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    if not prompts:
        raise UserError(f"{path}: expected at least one prompt, found none")
    return prompts


def digest(prompts: Sequence[FilePrompt]) -> str:
    """SHA-256 over the fields and token ids of all prompts, in their order."""
    total = hashlib.sha256()
    for prompt in prompts:
        total.update(json.dumps([prompt.fields, prompt.tokens], sort_keys=True).encode())
    return total.hexdigest()


def _tokens(raw: Any, tokenizer: Any, vocab_size: int, chat: bool, settings: ChatSettings) -> list[int]:
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object, found {kind_of(raw)}")
    if ("prompt" in raw) == ("messages" in raw):
        found = "both" if "prompt" in raw else ", ".join(json.dumps(key) for key in raw) or "none"
        raise UserError(f"expected the key {KINDS}; found {found}")
    if "messages" in raw or chat:
        tokens = _chat_tokens(raw, tokenizer, settings)
    else:
        tokens = tokenizer(text_field(raw, "prompt"))["input_ids"]
    if not tokens:
        raise UserError("prompt: expected at least one token, found none")
    if max(tokens) >= vocab_size:
        raise UserError(f"expected token ids below the model's vocab_size {vocab_size}, found {max(tokens)}")
    return tokens


def _chat_tokens(raw: dict[str, Any], tokenizer: Any, settings: ChatSettings) -> list[int]:
    key, tools = "messages" if "messages" in raw else "prompt", raw.get("tools")
    check_template(tokenizer, key, 'use records with "prompt", without --chat')
    if key == "prompt":
        messages = [{"role": "user", "content": text_field(raw, "prompt")}]
    else:
        messages = as_messages(raw["messages"]) if isinstance(raw["messages"], list) else raw["messages"]
    check_messages(messages, tools)
    if messages[-1]["role"] == "assistant":
        raise UserError("messages: expected the last one from the user or a tool, found one from the assistant")
    return prompt_tokens(messages, tokenizer, settings, tools)
