"""The forms of a record, recognised by its columns, and each as one of the three records that are tokenised.

Those three are `{"messages": [...]}`, optionally with `"tools"`; `{"prompt": ..., "completion": ...}`; and
`{"text": ...}`. ShareGPT's `conversations` and Alpaca's `instruction` and `output` become messages. Columns that the
form does not have are left out and named. A column that holds null counts as absent: tables fill missing ones with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxmoe.data import forms
from jaxmoe.data.chat import MESSAGE_KEYS, kind_of, text_field
from jaxmoe.errors import ConfigError, UserError, shown
from jaxmoe.json_text import parse_json

Columns = dict[str, Any]  # a record: column -> what JSON can hold


@dataclass(frozen=True)
class RecordForm:
    """One form: a record has it if all `columns` hold something; `optional` ones are read where they do.

    `read` makes one of the records that are tokenised from these columns alone.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Columns], Columns]
    optional: tuple[str, ...] = ()

    @property
    def known(self) -> tuple[str, ...]:
        """Every column that the form reads."""
        return self.columns + self.optional


_NOT_LEARNED = ("false", "0", "0.0")  # labels of a completion, as JSON's values or as texts of a table


class Recognised(NamedTuple):
    """A record in the form that is tokenised, the form that it had, and the columns that were left out."""

    record: Columns
    form: RecordForm
    ignored: tuple[str, ...]


def recognised(raw: Any, among: Sequence[RecordForm] | None = None) -> Recognised:
    """One parsed JSON value in the first form of `among` (default: `FORMS`) whose columns it has.

    Raises:
        UserError: no object, no known form, or columns that do not hold what the form needs.
    """
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object, found {kind_of(raw)}")
    among = FORMS if among is None else among
    present = {name for name, value in raw.items() if value is not None}
    # A column that should hold something and holds null is named by the form that needs it.
    form = _first(among, present) or _first(among, set(raw))
    if form is None:
        raise UserError(_unknown(raw) if among is FORMS else _no_pair(raw))
    if form in PAIRS:
        _check_prompt(raw)
    label = raw.get("label")
    if "completion" in form.columns and str(label).lower() in _NOT_LEARNED:
        found = json.dumps(label)
        raise UserError(f"label: expected true (every completion is learned), found {found}; leave the record out")
    ignored = tuple(name for name in raw if name in present and name not in form.known)
    needed = {name: raw[name] for name in form.known if name in present or (name in form.columns and name in raw)}
    return Recognised(form.read(needed), form, ignored + _unread_keys(needed))


def _first(among: Iterable[RecordForm], columns: set[str]) -> RecordForm | None:
    return next((form for form in among if columns.issuperset(form.columns)), None)


def _no_pair(raw: Columns) -> str:
    wanted = 'the keys "chosen" and "rejected" (and "prompt"), since the loss compares answers'
    return f"expected {wanted}; found {_keys(raw)}"


def _keys(raw: Columns) -> str:
    return ", ".join(json.dumps(key) for key in list(raw)[:20]) or "none"


def _unknown(raw: Columns) -> str:
    advice = forms.unread_record(raw)
    return (
        'expected the keys "messages" (and "tools"), "conversations", "prompt" and "completion", "instruction" and '
        f'"output", or "text"; found {_keys(raw)}{f" ({advice})" if advice else ""}'
    )


def _conversation(record: Columns, column: str) -> Columns:
    """The turns in `column` as messages: with role and content, or in ShareGPT's form with from and value.

    What tables add is undone: nulls in place of missing keys, tools or all turns as a string of JSON.
    """
    turns = _turns(record[column])
    if not isinstance(turns, list):
        raise UserError(f"{column}: expected a list, found {kind_of(turns)}")
    messages = as_messages(turns)
    system = record.get("system")
    if system is not None and text_field(record, "system") and all(_role(each) != "system" for each in messages):
        messages = [{"role": "system", "content": system}, *messages]
    return {"messages": messages} | _tools(record)


def as_messages(turns: Sequence[Any]) -> list[Any]:
    """Turns of any known form as messages with the keys that are read; what is no turn stays for the check of the
    messages, which names it.

    Raises:
        UserError: a turn that does not hold what its form needs, or that is not to be learned.
    """
    return [message for n, turn in enumerate(turns, 1) for message in _messages(turn, f"message {n}: ")]


def _messages(turn: Any, where: str) -> list[Any]:
    """The messages of one turn: two, where it holds a question and its answer."""
    if isinstance(turn, dict) and {"input", "output"} <= set(turn) and not {"from", "role"} & set(turn):
        return [{"role": "user", "content": turn["input"]}, {"role": "assistant", "content": turn["output"]}]
    message = _turn(turn, where)
    if not isinstance(message, dict):
        return [message]
    message = _learned(_called(_thought(_present(message))), where)
    kept = {key: value for key, value in message.items() if key in MESSAGE_KEYS or "role" not in message}
    return [kept | {"content": _joined(kept["content"])} if "content" in kept else kept]


def _turns(value: Any) -> Any:
    """The turns of a conversation, which some tables hold as a string of JSON, or as a list for each key."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        return parse_json(value, "messages")
    lists = [*value.values()] if isinstance(value, dict) else []
    if lists and all(isinstance(each, list) for each in lists) and len(set(map(len, lists))) == 1:
        return [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]
    return value


def _unread_keys(columns: Columns) -> tuple[str, ...]:
    """What is left out of the messages in these columns, by the names COLUMN.KEY."""
    found: dict[str, None] = {}
    for name in filter(columns.__contains__, _OF_TURNS):
        turns = _turns(columns[name]) if name.startswith(("messages", "conversation")) else columns[name]
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                found |= {f"{name}.{key}": None for key in turn if turn[key] is not None and key not in _TURN_KEYS}
    return tuple(found)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _present(value: Any) -> Any:
    """A message without the keys that hold null; content stays, since null is allowed there beside tool calls."""
    if not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if each is not None or key == "content"}


def _learned(message: Columns, where: str) -> Columns:
    """The message, whose loss weight may stand under several names; an answer that is not to be learned is refused."""
    for name in _WEIGHTS:
        weight = message.get(name, 1)
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise UserError(f"{where}{name}: expected 0 or 1, found {shown(weight)}")
        if message.get("role") == "assistant" and not weight:
            found = json.dumps(weight)
            raise UserError(f"{where}{name}: expected 1 (every answer is learned), found {found}; leave the record out")
    return message


def _thought(message: Columns) -> Columns:
    """The message with its thought, if it has one, under the name that templates know."""
    for name in _THOUGHTS:
        if isinstance(message.get(name), str) and "reasoning_content" not in message:
            return message | {"reasoning_content": message[name]}
    return message


def _called(message: Columns) -> Columns:
    """The message in OpenAI's present form, where an answer has a list of calls and their results come from a tool."""
    if message.get("role") == "function":
        message = message | {"role": "tool"}
    if isinstance(call := message.get("function_call"), dict) and "tool_calls" not in message:
        message = {"content": None} | message | {"tool_calls": [{"type": "function", "function": call}]}
    return message


def _joined(content: Any) -> Any:
    """The text of content in parts, one a line; other content as it is."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content]
        if all(part.get("type") == "text" for part in content) and all(isinstance(text, str) for text in texts):
            return "\n".join(str(text) for text in texts)
    return content


def _tools(record: Columns) -> Columns:
    """The column "tools" as a list; tables often hold it as a string of JSON, and an empty one for no tools."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools, "tools") if tools.strip() else None
        except ConfigError:
            raise UserError("tools: expected a list of objects, or one as a string of JSON, found a string") from None
    return {} if tools is None else {"tools": tools}


# who speaks in ShareGPT's form -> the role
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
_CALLS = ("function_call", "tool_call")  # of the speakers: the text holds calls
_WEIGHTS = ("weight", "loss", "train")  # of a message: whether it is learned
_THOUGHTS = ("reasoning", "thinking")  # of a message: other names of its thought
_TURN_KEYS = {*MESSAGE_KEYS, *_WEIGHTS, *_THOUGHTS, "from", "value", "function_call", "input", "output"}
_OF_TURNS = ("messages", "conversations", "conversation", "chosen", "rejected", "prompt", "completion")  # columns


def _turn(turn: Any, where: str) -> Any:
    """A turn of ShareGPT's form as a message. Some files have the one's `role` beside the other's `value`."""
    if not isinstance(turn, dict) or not ("from" in turn or ("role" in turn and "value" in turn)):
        return turn
    name = "from" if "from" in turn else "role"
    speaker = turn[name]
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f'{where}"{name}": expected one of {", ".join(_SPEAKERS)}; found {str(speaker)[:50]!r}')
    others = {key: value for key, value in turn.items() if key not in ("from", "value", "role", "content")}
    text = turn["value"] if "value" in turn else turn.get("content")
    if str(speaker).lower() in _CALLS:
        calls = _calls(text_field({"value": text}, "value", where=where), where)
        return {"role": role, "content": "", "tool_calls": calls} | others
    return {"role": role, "content": text} | others


def _calls(text: str, where: str) -> list[Any]:
    """The tool calls in a turn of "function_call": an object with name and arguments, or a list of these, as JSON."""
    try:
        calls = parse_json(text, "value")
    except ConfigError as error:
        raise UserError(f"{where}{error}") from None
    return calls if isinstance(calls, list) else [calls]


def _alpaca(record: Columns) -> Columns:
    """Alpaca's form as a conversation: `input` follows `instruction` on a new line; `history` holds earlier pairs."""
    question = text_field(record, "instruction")
    if record.get("input") is not None and (given := text_field(record, "input")):
        question = f"{question}\n{given}" if question else given
    pairs = record.get("history") or []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise UserError("history: expected a list of pairs (question, answer), found something else")
    messages = []
    if record.get("system") is not None and (system := text_field(record, "system")):
        messages.append({"role": "system", "content": system})
    for asked, answered in [*pairs, (question, text_field(record, "output", empty=False))]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"messages": messages}


def _dolly(record: Columns) -> Columns:
    """Alpaca's form under other names, those of Dolly."""
    names = {"response": "output", "context": "input"}
    return _alpaca({names.get(name, name): value for name, value in record.items()})


def _pair(record: Columns) -> Columns:
    """A preference pair with lists of messages in place of turns; strings stay strings. Beside ShareGPT's
    `conversations` the answers are one turn each."""
    columns = {"prompt": record.get("conversations")} | record
    read: Columns = {}
    for name in ("prompt", "chosen", "rejected"):
        value = columns[name]
        value = [value] if isinstance(value, dict) else value
        try:
            read[name] = as_messages(value) if isinstance(value, list) else value
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return read | _tools(record)


_PROMPTS = ("question", "instruction", "query")  # columns where other tools look for the prompt of a pair


def _check_prompt(raw: Columns) -> None:
    """Raises UserError if a pair's answers have no prompt, but it stands under another name."""
    if raw.get("prompt") is not None or raw.get("conversations") is not None:
        return
    answer = raw["chosen"]
    first = answer[0] if isinstance(answer, list) and answer else answer
    for name in _PROMPTS:
        text = raw.get(name)
        within = isinstance(answer, str) and isinstance(text, str) and text in answer
        if text is not None and not within and (isinstance(answer, str) or _role(first) in (None, "assistant")):
            raise UserError(f'expected the prompt of the pair under "prompt", found {json.dumps(name)}; rename it')


def _completion(record: Columns) -> Columns:
    """A prompt and its completion as strings; or, where one of them holds messages, both as one conversation."""
    if not any(isinstance(value, list | dict) for value in record.values()):
        return record
    messages = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[name]
        value = {"role": role, "content": value} if isinstance(value, str) else value
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list):
            raise UserError(f"{name}: expected a string or a list of messages, found {kind_of(value)}")
        try:
            found = as_messages(value)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        if name == "prompt" and any(_role(message) == "assistant" for message in found):
            way_out = 'write prompt and completion as strings, or all turns under "messages" to learn each answer'
            raise UserError(f"prompt: expected none of the answers, which are all learned, found one; {way_out}")
        messages += found
    return {"messages": messages}


def _as_it_is(record: Columns) -> Columns:
    return record


def _chat(name: str, column: str) -> RecordForm:
    return RecordForm(name, (column,), lambda record: _conversation(record, column), ("system", "tools"))


# In order of precedence: a record with the columns of several forms has the first.
FORMS: tuple[RecordForm, ...] = (
    _chat("messages", "messages"),
    _chat("ShareGPT's conversations", "conversations"),
    _chat("ShareGPT's conversation", "conversation"),
    RecordForm("prompt and completion", ("prompt", "completion"), _completion),
    RecordForm("Alpaca's instructions", ("instruction", "output"), _alpaca, ("input", "system", "history")),
    RecordForm("instruction and response", ("instruction", "response"), _dolly, ("context", "system")),
    RecordForm("text", ("text",), _as_it_is),
)

# The form for losses over pairs of answers.
PAIRS: tuple[RecordForm, ...] = (
    RecordForm("preference pair", ("chosen", "rejected"), _pair, ("prompt", "conversations", "tools")),
)

# Columns that some reader of records wants beside those of `FORMS`: captures the domain, preferences the pairs.
_OTHERS = ("domain", "chosen", "rejected", *_PROMPTS)
_READ = frozenset(_OTHERS).union(*(form.known for form in FORMS))


def columns_that_are_read(names: Iterable[str]) -> list[str]:
    """Those of a table's columns that some form of record has, in the table's order."""
    return [name for name in names if name in _READ]


def check_columns(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns of a table that no record can need.

    Raises:
        UserError: its records cannot have any known form. The message starts with `where`.
    """
    if _first(FORMS, set(names)) is None and not {"chosen", "rejected"}.issubset(names):
        raise UserError(f"{where}: {_unknown(dict.fromkeys(names))}")
    return tuple(name for name in names if name not in _READ)
