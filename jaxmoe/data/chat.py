"""Tokenizers and chat templates: a conversation as text, and which parts of it are the assistant's turns."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmoe import limited
from jaxmoe.data.forms import first_bytes
from jaxmoe.errors import ConfigError, UserError, shown
from jaxmoe.json_text import NOT_DOWNLOADED, is_pointer, parse_json, read_json
from jaxmoe.tokenizer_files import FORMS, NEEDED, check_small_files, has_tokenizer

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# The end of a generation prompt that opens a thought. Templates of thinking models leave it out of earlier turns.
_OPENED_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?$")

_log = logging.getLogger("jaxmoe")

Piece = tuple[str | list[int], float]  # text or token ids, and the loss weight of each of its tokens


@dataclass(frozen=True)
class ChatSettings:
    """What is rendered with every conversation beside its messages.

    `system` is the system message of conversations without one; `arguments` are passed to the chat template. The tools
    of a record go before those in `arguments`.
    """

    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def messages(self, messages: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The messages that are rendered."""
        if self.system is None or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.system}, *messages]


AS_WRITTEN = ChatSettings()  # conversations are rendered without anything else


def load_tokenizer(folder: str | pathlib.Path) -> Any:
    """The tokenizer in a model folder (HF or converted), loaded with transformers' `AutoTokenizer`.

    Code that the folder brings (`auto_map`) never runs; a notice says that it was ignored.

    Raises:
        UserError: the folder holds no tokenizer, or one without an end-of-text token.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"folder not found: {folder} (expected one with a tokenizer)")
    if not has_tokenizer(folder):
        raise UserError(f"{folder}: expected a tokenizer ({NEEDED}), found none")
    check_small_files(folder)
    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        if file.is_file() and "auto_map" in read_json(file):
            _log.warning(f"{file}: auto_map: ignored, because code from a checkpoint never runs")
    for file in (folder / name for form in FORMS for name in form):
        if file.is_file() and is_pointer(first_bytes(file)):
            raise UserError(f"{file}: expected a tokenizer, found {NOT_DOWNLOADED}")
    try:
        with _quiet_transformers():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            usable = isinstance(tokenizer.get_vocab(), dict) and tokenizer("a") is not None
            eos = tokenizer.eos_token_id
    except BaseException as error:
        # The type depends on the file that is broken; a panic of the tokenizers library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        _check_json(folder)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: expected a tokenizer, found none that can be loaded ({reason[:300]})") from None
    assert usable
    if eos is None:
        raise UserError(f"{folder}: expected a tokenizer with an eos_token, found none")
    _check_templates(folder, tokenizer.chat_template)
    # Lengths are compared with the model's context where it matters; transformers would warn of every long text.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


_JSON = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json", "added_tokens.json")


def _check_json(folder: pathlib.Path) -> None:
    """Raises UserError, which names the file, if one of a tokenizer's holds no JSON object."""
    for file in (folder / name for name in _JSON):
        if file.is_file():
            read_json(file)


def _check_templates(folder: pathlib.Path, templates: Any) -> None:
    """Raises UserError unless the tokenizer has no chat template, one, or several with names."""
    named = templates if isinstance(templates, dict) else {"chat_template": templates}
    for name, template in named.items():
        if template is not None and not isinstance(template, str):
            raise UserError(f"{folder}: {name}: expected a chat template as text, found {kind_of(template)}")


def _nothing(record: logging.LogRecord) -> bool:
    return False


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Drops transformers' warnings: that PyTorch is missing, which is not needed, and advice on broken tokenizers."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    logger = logging.getLogger("transformers")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before


def conversation_pieces(messages: Any, tools: Any, tokenizer: Any, settings: ChatSettings = AS_WRITTEN) -> list[Piece]:
    """A conversation as the tokenizer's chat template renders it, in pieces; the assistant's turns have weight 1.

    Raises:
        UserError: malformed messages, no chat template, or nothing to learn.
    """
    check_messages(messages, tools)
    if all(message["role"] != "assistant" for message in messages):
        raise UserError("messages: expected at least one message from the assistant, found none")
    check_template(tokenizer, "messages", 'use records with "text", or "prompt" and "completion"')
    pieces: list[Piece] = []
    if isinstance(tokenizer.chat_template, str) and _GENERATION_TAG.search(tokenizer.chat_template):
        # The template marks what the assistant generates; each of its tokens is learned.
        pieces = _marked_pieces(_rendered(messages, tools, tokenizer, settings), tokenizer)
    else:
        text, spans = assistant_spans(messages, tools, tokenizer, settings)
        at = 0
        for start, end in spans:
            pieces += [(text[at:start], 0.0), (text[start:end], 1.0)]
            at = end
        pieces.append((text[at:], 0.0))
    if not any(weight and piece for piece, weight in pieces):
        raise UserError("messages: expected an answer to learn, found none after the chat template was applied")
    return pieces


def prompt_tokens(
    messages: Sequence[dict[str, Any]],
    tokenizer: Any,
    settings: ChatSettings = AS_WRITTEN,
    tools: list[Any] | None = None,
) -> list[int]:
    """Token ids of a conversation that the assistant is to continue.

    Raises:
        UserError: the chat template rejects the messages or the arguments.
    """
    rendered = _rendered(messages, tools, tokenizer, settings, add_generation_prompt=True)
    return tokenizer(rendered.text, add_special_tokens=False)["input_ids"]


def check_template(tokenizer: Any, where: str, otherwise: str) -> None:
    """Raises UserError if the tokenizer has no chat template; the message starts with `where`, and `otherwise` is a way
    to do without one."""
    if not tokenizer.chat_template:
        way_out = f"put a chat_template.jinja into the model's folder, or {otherwise}"
        raise UserError(f"{where}: expected a tokenizer with a chat template, found none; {way_out}")


def chat_text(
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    tokenizer: Any,
    settings: ChatSettings = AS_WRITTEN,
    *,
    to_continue: bool = False,
) -> str:
    """A conversation as the chat template renders it; `to_continue` appends the generation prompt.

    Raises:
        UserError: the chat template rejects the messages or the arguments.
    """
    return _rendered(messages, tools, tokenizer, settings, add_generation_prompt=to_continue).text


def check_messages(messages: Any, tools: Any = None) -> None:
    """Raises UserError unless these are the messages of a conversation, and objects that describe tools or None."""
    if not isinstance(messages, list):
        raise UserError(f"messages: expected a list, found {kind_of(messages)}")
    if not messages:
        raise UserError("messages: expected at least one message, found none")
    check_objects(tools, "tools")
    for number, message in enumerate(messages, start=1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: expected an object, found {kind_of(message)}")
        if unknown := sorted(set(message) - MESSAGE_KEYS):
            known = ", ".join(sorted(MESSAGE_KEYS))
            raise UserError(f"{where}: expected the keys {known}; found {shown(unknown[0])}")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}: expected a role of {', '.join(ROLES)}; found {shown(message.get('role'))}")
        calls = message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise UserError(f"{where}: expected tool_calls to be a list of objects, found {kind_of(calls)}")
        for key in ("content", "reasoning_content"):
            optional = key == "reasoning_content" or bool(calls)
            if not (optional and message.get(key) is None):
                text_field(message, key, where=f"{where}: ")
        if message["role"] == "assistant" and not message.get("content") and not calls:
            raise UserError(f"{where}: expected an answer, found an empty one")


def check_objects(values: Any, name: str) -> None:
    """Raises UserError unless `values` is None or a list of objects."""
    if values is not None and not (isinstance(values, list) and all(isinstance(value, dict) for value in values)):
        raise UserError(f"{name}: expected a list of objects, found {kind_of(values)}")


def assistant_spans(
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    tokenizer: Any,
    settings: ChatSettings = AS_WRITTEN,
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the character range of every assistant turn in it.

    A turn starts where the generation prompt ends, as in generation, and ends with the special token that closes it. A
    thought that the template keeps belongs to the turn.

    Rendering the conversation up to each turn would not find the turns. Qwen3's template writes an empty thought into
    the last turn and strips the thoughts of turns before the last question, so the rendering of a prefix is not a
    prefix of the whole. Instead, the whole is rendered once more for each turn, with the answer replaced by a character
    that occurs nowhere else. The text before and after that character must be the same in the true rendering.

    Raises:
        UserError: the chat template rejects the messages, or its turns cannot be found in this way.
    """
    render = lambda messages, **options: _rendered(messages, tools, tokenizer, settings, **options).text
    whole, prompted = render(messages), render(messages, add_generation_prompt=True)
    prompt = prompted[len(whole) :]
    if not prompt or not prompted.startswith(whole):
        raise UserError(
            "chat template: expected it to append a generation prompt to the messages, found another rendering"
        )
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in prompted)
    closers, spans = _special_tokens(tokenizer), []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        replaced = [*messages[:turn], {"role": "assistant", "content": mark}, *messages[turn + 1 :]]
        before, found, after = render(replaced).partition(mark)
        # A template that opens a thought in the generation prompt may leave the thought out of earlier turns.
        headers = (prompt, _OPENED_THOUGHT.sub("", prompt))
        start = max((before.rfind(header) + len(header) for header in headers if header in before), default=-1)
        end = len(whole) - len(after)
        bounded = whole.startswith(before[:start]) and whole.endswith(after) and start <= end
        if not found or start < (spans[-1][1] if spans else 0) or not bounded:
            raise UserError(f"chat template: cannot find the answer of message {turn + 1} in the rendered text")
        closer = _closer(after, closers)
        if closer is None:
            raise UserError(
                f"chat template: expected a special token after the answer of message {turn + 1}, found {after[:20]!r}"
            )
        spans.append((start, end + after.index(closer) + len(closer)))
    return whole, spans


def turn_end(tokenizer: Any) -> int | None:
    """The token that ends the assistant's turn in the chat template; None if the template shows none.

    A base model has this token and may be trained on chats, while its files name the end of a text only.
    """
    mark = "\ue000"
    try:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
        after = _rendered(messages, None, tokenizer, AS_WRITTEN).text.partition(mark)[2]
    except UserError:
        return None
    closer = _closer(after, _special_tokens(tokenizer))
    return None if closer is None else tokenizer.convert_tokens_to_ids(closer)


def _special_tokens(tokenizer: Any) -> list[str]:
    """The special tokens, longest first."""
    return sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=len, reverse=True)


def _closer(after: str, tokens: Sequence[str]) -> str | None:
    """Which of `tokens` the text after an answer starts with, white space aside."""
    return next((token for token in tokens if after.lstrip().startswith(token)), None)


def _rendered(
    messages: Sequence[dict[str, Any]],
    tools: list[Any] | None,
    tokenizer: Any,
    settings: ChatSettings,
    **options: Any,
) -> limited.Rendered:
    given = {**settings.arguments} if tools is None else {**settings.arguments, "tools": tools}
    return render_chat(tokenizer, settings.messages(messages), **given, **options)


def render_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    /,
    *,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> limited.Rendered:
    """The messages in the tokenizer's chat template, as `apply_chat_template` of transformers renders them.

    The template is code from the checkpoint: it is rendered in a second process, with limits of time, memory and text
    (`jaxmoe.limited`). `variables` are passed to the template, such as `enable_thinking`; the messages, the tools and
    `add_generation_prompt` stay what they are.

    Raises:
        UserError: no template, or one that fails or exceeds a limit.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        named = template
        template = (named.get("tool_use") if tools is not None else None) or named.get("default")
        if not template:
            raise UserError(f"chat template: expected one that is named default, found only {', '.join(named)}")
    if not template:
        raise UserError("chat template: expected a tokenizer with one, found none")
    special = {name: _plain_tokens(token) for name, token in tokenizer.special_tokens_map.items()}
    given = {"messages": [_for_template(message) for message in messages], "tools": tools}
    given |= {"add_generation_prompt": add_generation_prompt}
    try:
        return limited.render(template, special | {"documents": None} | variables | given)
    except UserError as error:
        odd = _odd_arguments(given["messages"])
        raise UserError(f"chat template: cannot render these messages: {error}{odd}") from None


def _odd_arguments(messages: Sequence[Mapping[str, Any]]) -> str:
    """What to add to an error if a tool call's arguments are not the object that most templates need."""
    for number, message in enumerate(messages, 1):
        for call in message.get("tool_calls") or ():
            function = call.get("function")
            arguments = (function if isinstance(function, dict) else call).get("arguments", {})
            if not isinstance(arguments, dict):
                return f" (message {number}: arguments of a tool call: expected an object, found {kind_of(arguments)})"
    return ""


def _plain_tokens(token: Any) -> Any:
    return [str(each) for each in token] if isinstance(token, list | tuple) else str(token)


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it on: without empty fields, and a thought under both of its names."""
    message = {key: value for key, value in _with_call_objects(message).items() if value is not None}
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}


def _with_call_objects(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as objects, which templates iterate over.

    OpenAI's form has them as a string of JSON. A string that holds no object stays as it is.
    """
    if not message.get("tool_calls"):
        return message
    return message | {"tool_calls": [_with_argument_object(call) for call in message["tool_calls"]]}


def _with_argument_object(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _with_argument_object(call["function"])}
    text = call.get("arguments")
    if not isinstance(text, str):
        return call
    try:
        arguments = parse_json(text, "arguments") if text.strip() else {}
    except ConfigError:
        return call
    return call | {"arguments": arguments} if isinstance(arguments, dict) else call


def _marked_pieces(rendered: limited.Rendered, tokenizer: Any) -> list[Piece]:
    """The tokens of the whole text, one per piece; a token that touches a marked range has weight 1."""
    encoded = tokenizer(rendered.text, add_special_tokens=False)
    weights = [0.0] * len(encoded["input_ids"])
    for start, end in rendered.generated:
        first, last = (encoded.char_to_token(at) for at in (start, end - 1)) if start < end else (None, None)
        if first is not None and last is not None:
            weights[first : last + 1] = [1.0] * (last + 1 - first)
    return [([token], weight) for token, weight in zip(encoded["input_ids"], weights, strict=True)]


def text_field(raw: dict[str, Any], key: str, *, empty: bool = True, where: str = "") -> str:
    """The string `raw[key]`; raises UserError for anything else, and for an empty string unless `empty`."""
    value = raw.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}{key}: expected a string, found {kind_of(value)}")
    if not value and not empty:
        raise UserError(f"{where}{key}: expected text, found an empty string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}{key}: expected Unicode text, found a lone surrogate") from None
    return value


def kind_of(value: Any) -> str:
    """What a value of a record is, in words."""
    names = {type(None): "nothing", bool: "true or false", str: "a string", list: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number", bytes: "bytes"}
    return names.get(type(value), f"a value of type {type(value).__name__}")  # tables have more types than JSON
