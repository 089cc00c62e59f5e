"""Preference pairs: two answers to one prompt, of which the chosen one is preferred to the rejected one.

A record has the keys "chosen", "rejected" and, unless both contain it, "prompt". They hold strings, or lists of
messages, which the checkpoint's chat template renders. What counts as prompt, and where an answer begins, is the same
as in TRL 1.16 (`trl.data_utils.extract_prompt`, `trl.DPOTrainer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmoe.data.chat import AS_WRITTEN, ChatSettings, chat_text, check_messages, check_template, kind_of, text_field
from jaxmoe.errors import UserError

_ANSWERS = ("chosen", "rejected")


class PairTexts(NamedTuple):
    """The prompt alone, and the prompt followed by each of the answers."""

    prompt: str
    chosen: str
    rejected: str


def pair_texts(record: dict[str, Any], tokenizer: Any, settings: ChatSettings = AS_WRITTEN) -> PairTexts:
    """A record in the form of `jaxmoe.data.record_forms.PAIRS` -> its texts. `eos_token` follows an answer that is a
    string and does not end in it; the chat template ends an answer of messages.

    Raises:
        UserError: not a preference pair.
    """
    if all(isinstance(record.get(key), str | None) for key in ("prompt", *_ANSWERS)):
        return _of_strings(record, tokenizer)
    return _of_messages(record, tokenizer, settings)


def _of_strings(record: dict[str, Any], tokenizer: Any) -> PairTexts:
    chosen, rejected = (text_field(record, key) for key in _ANSWERS)
    if record.get("prompt") is not None:
        prompt = text_field(record, "prompt")
        chosen, rejected = prompt + chosen, prompt + rejected
    else:
        prompt = chosen[: _prompt_length(chosen, rejected)]
    ended = lambda text: text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
    return PairTexts(prompt, ended(chosen), ended(rejected))


def _of_messages(record: dict[str, Any], tokenizer: Any, settings: ChatSettings) -> PairTexts:
    check_template(tokenizer, "chosen and rejected", "write prompt, chosen and rejected as strings")
    chosen, rejected = (_messages(record, key, role="assistant") for key in _ANSWERS)
    shared = _prompt_length(chosen, rejected)
    if not shared and record.get("prompt") is None:
        wanted = "a prompt of their own, or the same messages at their beginning"
        raise UserError(f"chosen and rejected: expected {wanted}, found none, and other first messages")
    if isinstance(record.get("prompt"), list) or not shared:
        prompt = _messages(record, "prompt", role="user")
        chosen, rejected = prompt + chosen, prompt + rejected
    else:
        prompt = chosen[:shared]
    tools = record.get("tools")
    for key, messages in zip(_ANSWERS, (chosen, rejected), strict=True):
        try:
            check_messages(messages, tools)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        if all(message["role"] != "assistant" for message in messages[len(prompt) :]):
            raise UserError(f"{key}: expected a message from the assistant, found none")
    to_continue = chat_text(prompt, tools, tokenizer, settings, to_continue=True)
    return PairTexts(to_continue, *(chat_text(each, tools, tokenizer, settings) for each in (chosen, rejected)))


def _messages(record: dict[str, Any], key: str, role: str) -> list[Any]:
    """The messages under `key`; a string is one message of `role`."""
    value = record.get(key)
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise UserError(f"{key}: expected a string or a list of messages, found {found}")
    return value


def _prompt_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many characters, or messages, both answers begin with: their prompt, without a space at its end. At least one
    is left to each answer."""
    shorter = min(len(chosen), len(rejected))
    for length in range(shorter):
        if chosen[length] != rejected[length]:
            return length - 1 if length and chosen[length - 1] == " " else length
    return max(shorter - 1, 0)
