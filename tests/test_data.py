"""Records -> tokens and loss weights -> packed batches: hand-worked masks, packing properties, every bad line."""

from __future__ import annotations

import gzip
import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.data import chat, packing
from jaxmoe.data.chat import ChatSettings, load_tokenizer
from jaxmoe.data.packing import Batch, Sequences, cut
from jaxmoe.data.records import Record, digest, hold_out, read_records, tokenize_record
from jaxmoe.errors import UserError
from jaxmoe.routing.text import read_documents
from peers.make_checkpoint import write_tokenizer

VOCAB = 320

# A template that treats thoughts as Qwen3's does: turns before the last question lose their thoughts, the last turn
# always has one, even if empty, and tool results belong to the user.
HYBRID = """\
{%- set ns = namespace(question=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.question = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- elif m.role != 'assistant' -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
{%- else -%}
{%- set content = m.content or '' -%}
{%- set thought = m.reasoning_content or '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.question and (loop.last or thought) -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content -}}
{%- for call in m.tool_calls or [] -%}{{- '<tool_call>' + call.name + '</tool_call>' -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
# The generation prompt of a model that always thinks opens the thought.
THINKING = HYBRID.replace(
    "{{- '<|im_start|>assistant\\n' -}}{%- endif -%}", "{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
# As in Qwen3-Coder: the arguments of a call are written one by one.
CODER = """\
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + (m.content or '') -}}
{%- for c in m.tool_calls or [] -%}{%- set call = c.function or c -%}{{- '<f=' + call.name + '>' -}}
{%- for key, value in call.arguments | items -%}{{- key ~ '=' ~ value ~ ';' -}}{%- endfor -%}
{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
MARKED = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' -%}{%- generation -%}{{- m.content + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}{{- m.content + '<|im_end|>' -}}{%- endif -%}{{- '\\n' -}}
{%- endfor -%}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(folder: pathlib.Path) -> Any:
    return load_tokenizer(folder)


def conversation(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def learned(record: Record, tokenizer: Any) -> list[str]:
    """The runs of learned tokens, as text."""
    runs: list[list[int]] = []
    before = 0.0
    for token, weight in zip(record.tokens.tolist(), record.weights.tolist(), strict=True):
        if weight and not before:
            runs.append([])
        if weight:
            runs[-1].append(token)
        before = weight
    return [tokenizer.decode(run) for run in runs]


TWO_TURNS = conversation(
    ("system", "S"),
    ("user", "Q1"),
    ("assistant", "<think>\nT1\n</think>\n\nA1"),
    ("user", "Q2"),
    ("assistant", "<think>\nT2\n</think>\n\nA2"),
)
WITH_TOOL = {
    "messages": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "reasoning_content": "why", "tool_calls": [{"name": "f"}]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "it is 7"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "7"},
    ]
}


def with_calls(*calls: dict[str, Any]) -> dict[str, Any]:
    turn = {"role": "assistant", "content": "", "tool_calls": list(calls)}
    return {"messages": [{"role": "user", "content": "Q"}, turn, {"role": "assistant", "content": "A"}]}


def call_of(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


CALLED = ["<f=f>x=3;y=[1];<f=f><|im_end|>", "A<|im_end|>"]
MASKS = {
    "plain": (None, conversation(("user", "hi"), ("assistant", "yo")), ["yo<|im_end|>"]),
    "plain turns": (
        None,
        conversation(("user", "a"), ("assistant", "b"), ("user", "b"), ("assistant", "bb")),
        ["b<|im_end|>", "bb<|im_end|>"],
    ),
    "thoughts of earlier turns are gone": (
        HYBRID,
        TWO_TURNS,
        ["A1<|im_end|>", "<think>\nT2\n</think>\n\nA2<|im_end|>"],
    ),
    "empty thought": (
        HYBRID,
        conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"],
    ),
    "tool calls": (
        HYBRID,
        WITH_TOOL,
        ["<tool_call>f</tool_call><|im_end|>", "it is 7<|im_end|>", "<think>\n\n</think>\n\n7<|im_end|>"],
    ),
    "thought between tool calls": (
        HYBRID,
        {"messages": WITH_TOOL["messages"][:4]},
        [
            "<think>\nwhy\n</think>\n\n<tool_call>f</tool_call><|im_end|>",
            "<think>\n\n</think>\n\nit is 7<|im_end|>",
        ],
    ),
    "opened thought": (THINKING, TWO_TURNS, ["A1<|im_end|>", "T2\n</think>\n\nA2<|im_end|>"]),
    "generation tag": (
        MARKED,
        conversation(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        ["b<|im_end|>", "c<|im_end|>"],
    ),
    "calls with objects": (CODER, with_calls(call_of({"x": 3, "y": [1]}), call_of({})), CALLED),
    "calls with strings": (CODER, with_calls(call_of('{"x": 3, "y": [1]}'), call_of("")), CALLED),
    "calls without a function": (CODER, with_calls(call_of('{"x": 3, "y": [1]}')["function"], call_of("{}")), CALLED),
    "completion": (None, {"prompt": "1+1=", "completion": "2"}, ["2<|im_end|>"]),
    "completion with its end": (None, {"prompt": "1+1=", "completion": "2<|im_end|>"}, ["2<|im_end|>"]),
    "text": (None, {"text": "a\nb"}, ["a\nb<|im_end|>"]),
    "text with its end": (None, {"text": "a<|im_end|>\n"}, ["a<|im_end|>\n"]),
    "text with an end inside": (None, {"text": "a<|im_end|>b"}, ["a<|im_end|>b<|im_end|>"]),
}


def check_mask(name: str, tokenizer: Any) -> None:
    template, raw, expected = MASKS[name]
    if template is not None:
        tokenizer.chat_template = template
    assert learned(tokenize_record(raw, tokenizer), tokenizer) == expected


@pytest.mark.parametrize("name", MASKS)
def test_mask(name: str, tokenizer: Any) -> None:
    check_mask(name, tokenizer)


@pytest.mark.parametrize("name", ["plain", "empty thought", "tool calls", "opened thought", "calls with strings"])
def test_mask_of_a_shifted_span_is_noticed(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = chat.assistant_spans

    def shifted(*args: Any) -> tuple[str, list[tuple[int, int]]]:
        text, spans = right(*args)
        return text, [(start + 1, end) for start, end in spans]

    monkeypatch.setattr(chat, "assistant_spans", shifted)
    with pytest.raises(AssertionError):
        check_mask(name, tokenizer)


def test_tokens_are_those_of_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = HYBRID
    for raw in (TWO_TURNS, WITH_TOOL):
        whole = tokenizer.apply_chat_template(raw["messages"], tokenize=True, return_dict=True)["input_ids"]
        assert tokenize_record(raw, tokenizer).tokens.tolist() == whole


# The generation prompt of Qwen3: with enable_thinking false it closes an empty thought.
SWITCHED = HYBRID.replace(
    "{{- '<|im_start|>assistant\\n' -}}{%- endif -%}",
    "{{- '<|im_start|>assistant\\n' -}}{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}{%- endif -%}",
)
QUESTION = conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
SETTINGS: dict[str, tuple[str, dict[str, Any], ChatSettings, list[str]]] = {
    "an empty thought is learned": (
        SWITCHED,
        QUESTION,
        ChatSettings(),
        ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"],
    ),
    "no thinking": (
        SWITCHED,
        QUESTION,
        ChatSettings(arguments={"enable_thinking": False}),
        ["b<|im_end|>", "d<|im_end|>"],
    ),
    "a system message": (SWITCHED, QUESTION, ChatSettings("S"), ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]),
    "a marked template": (
        "{{ style }}" + MARKED,
        QUESTION,
        ChatSettings("S", {"style": "x"}),
        ["b<|im_end|>", "d<|im_end|>"],
    ),
    "tools": (
        "{%- for tool in tools or [] -%}{{- tool.name -}}{%- endfor -%}" + HYBRID,
        conversation(("user", "a"), ("assistant", "b")),
        ChatSettings(arguments={"tools": [{"name": "f"}]}),
        ["<think>\n\n</think>\n\nb<|im_end|>"],
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_the_template(name: str, tokenizer: Any) -> None:
    """The text is that of `apply_chat_template` with the same messages and arguments; the mask is as expected."""
    tokenizer.chat_template, raw, chat_settings, expected = SETTINGS[name]
    record = tokenize_record(raw, tokenizer, chat_settings)
    assert learned(record, tokenizer) == expected
    first = [] if chat_settings.system is None else [{"role": "system", "content": chat_settings.system}]
    messages = [*first, *raw["messages"]]
    assert (
        record.tokens.tolist()
        == (
            tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **chat_settings.arguments)[
                "input_ids"
            ]
        )
    )


def test_a_record_goes_before_the_settings(tokenizer: Any) -> None:
    tokenizer.chat_template = SETTINGS["tools"][0]
    raw = TWO_TURNS | {"tools": [{"name": "g"}]}
    found = tokenize_record(raw, tokenizer, ChatSettings("T", {"tools": [{"name": "f"}]}))
    assert found.tokens.tolist() == tokenize_record(raw, tokenizer).tokens.tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=8), st.text("a<>|/\n im_endthk", min_size=1, max_size=12)), min_size=1, max_size=4
    )
)
def test_mask_of_any_conversation(folder: pathlib.Path, turns: list[tuple[str, str]]) -> None:
    tokenizer = load_tokenizer(folder)
    raw = conversation(*(turn for question, answer in turns for turn in (("user", question), ("assistant", answer))))
    assert learned(tokenize_record(raw, tokenizer), tokenizer) == [f"{answer}<|im_end|>" for _, answer in turns]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}", "generation prompt"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
            "special token after the answer of message 2",
        ),
        (
            "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}#{% endif %}",
            "cannot find the answer of message 2",
        ),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages | nonsense }}", "nonsense"),
    ],
)
def test_unusable_template(template: str, found: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"chat template: .*{found}"):
        tokenize_record(conversation(("user", "a"), ("assistant", "b")), tokenizer)


def test_no_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="expected a tokenizer with a chat template, found none"):
        tokenize_record(conversation(("user", "a"), ("assistant", "b")), tokenizer)


@pytest.mark.parametrize(("arguments", "found"), [('{"x": 3', "a string"), (None, "nothing"), ([1], "a list")])
def test_a_template_that_needs_objects_says_which_arguments_are_none(
    arguments: Any, found: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = CODER
    with pytest.raises(UserError, match=rf"message \d: arguments of a tool call: expected an object, found {found}\)$"):
        tokenize_record(with_calls(call_of(arguments)), tokenizer)


def test_a_template_for_tools_alone_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = {"tool_use": CODER}
    with pytest.raises(UserError, match="expected one that is named default, found only tool_use"):
        tokenize_record(
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, tokenizer
        )


@pytest.mark.parametrize("arguments", ["x=3", "[1]", "3", '{"x": 3'])
def test_arguments_that_are_no_object_stay_text(arguments: str, tokenizer: Any) -> None:
    tokenizer.chat_template = CODER.replace("call.arguments | items", "[['text', call.arguments]]")
    raw = with_calls(call_of(arguments))
    assert learned(tokenize_record(raw, tokenizer), tokenizer)[0] == f"<f=f>text={arguments};<|im_end|>"
    assert raw == with_calls(call_of(arguments)), "the record itself is not changed"


BAD_LINES = {
    "not JSON": (b"{", "expected JSON, found"),
    "not UTF-8": (b'{"text": "\xff"}', "expected UTF-8, found byte 0xff at byte 11"),
    "a list": (b"[]", "expected a JSON object, found a list"),
    "a number": (b"1", "expected a JSON object, found a number"),
    "null": (b"null", "expected a JSON object, found nothing"),
    "no key": (b"{}", "expected the keys .*; found none"),
    "unknown key": (b'{"texts": "a", "id": 1}', 'found "texts", "id"'),
    "nulls alone": (b'{"text": null, "id": 1}', "text: expected a string, found nothing"),
    "ShareGPT without turns": (b'{"conversations": 1, "id": 1}', "conversations: expected a list, found a number"),
    "an unknown speaker": (
        b'{"conversations": [{"from": "moderator", "value": "a"}]}',
        "message 1: .from.: expected one of human, .*; found 'moderator'",
    ),
    "a call that is no JSON": (
        b'{"conversations": [{"from": "function_call", "value": "{"}]}',
        "message 1: value: expected JSON, found",
    ),
    "an answer that is not to be learned": (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}',
        "message 1: weight: expected 1 .every answer is learned., found 0",
    ),
    "a weight of another kind": (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
        "message 1: weight: expected 0 or 1, found 0.5",
    ),
    "Alpaca without an answer": (b'{"instruction": "a", "output": ""}', "output: expected text, found an empty string"),
    "a history of other things": (
        b'{"instruction": "a", "output": "b", "history": [["c"]]}',
        "history: expected a list of pairs",
    ),
    "tools that are no JSON": (
        b'{"messages": [], "tools": "f"}',
        "tools: expected a list of objects, or one as a string",
    ),
    "preferences": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}', "pairs of answers"),
    "other names": (b'{"question": "a", "answer": "b"}', 'write "prompt" .question. and "completion" .answer.'),
    "half a pair": (b'{"prompt": "a"}', 'found "prompt"'),
    "text of another type": (b'{"text": ["a"]}', "text: expected a string, found a list"),
    "empty text": (b'{"text": ""}', "text: expected text, found an empty string"),
    "empty completion": (b'{"prompt": "a", "completion": ""}', "completion: expected text, found an empty string"),
    "prompt of another type": (b'{"prompt": null, "completion": "a"}', "prompt: expected a string, found nothing"),
    "lone surrogate": (b'{"text": "\\ud800"}', "text: expected Unicode text, found a lone surrogate"),
    "messages of another type": (b'{"messages": {}}', "messages: expected a list, found an object"),
    "no messages": (b'{"messages": []}', "messages: expected at least one message, found none"),
    "message of another type": (b'{"messages": ["a"]}', "message 1: expected an object, found a string"),
    "unknown role": (b'{"messages": [{"role": "bot", "content": "a"}]}', "message 1: expected a role of .*'bot'"),
    "a message without a role": (
        b'{"messages": [{"content": "a", "text": "a"}]}',
        "message 1: expected the keys .*'text'",
    ),
    "no content": (b'{"messages": [{"role": "user"}]}', "message 1: content: expected a string, found nothing"),
    "content with a picture": (
        b'{"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}',
        "message 1: content: expected a string, found a list",
    ),
    "an answer that is masked": (
        b'{"messages": [{"role": "assistant", "content": "a", "train": false}]}',
        "message 1: train: expected 1 .every answer is learned., found false",
    ),
    "messages that are no JSON": (b'{"messages": "[{"}', "messages: expected JSON, found no key in double quotes"),
    "bad tool calls": (
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": "f"}]}',
        "message 1: expected tool_calls to be a list of objects, found a string",
    ),
    "bad tools": (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": 1}',
        "tools: expected a list of objects, found a number",
    ),
    "no assistant": (
        b'{"messages": [{"role": "user", "content": "a"}]}',
        "messages: expected at least one message from the assistant, found none",
    ),
    "empty answer": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}',
        "message 2: expected an answer, found an empty one",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_named(name: str, tokenizer: Any, tmp_path: pathlib.Path) -> None:
    line, message = BAD_LINES[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"data\.jsonl:3: .*{message}") as caught:
        read_records(path, tokenizer, VOCAB)
    assert "\n" not in str(caught.value)


def test_an_earlier_lines_error_goes_first(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    """The error names the right line, although texts are encoded, and token ids seen, many lines later."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"text": 7}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:1: expected token ids below"):
        read_records(path, tokenizer, 258)
    with pytest.raises(UserError, match=r"data\.jsonl:2: text: expected a string"):
        read_records(path, tokenizer, VOCAB)


def test_records_read_together_are_those_read_apart(
    tokenizer: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raws = [
        {"text": "a b"},
        {"prompt": "", "completion": "c"},
        conversation(("user", "d"), ("assistant", "e")),
        {"text": "f"},
    ]
    lines = [json.dumps(raw) + "\n" for raw in raws]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(lines))
    calls = []
    monkeypatch.setattr("jaxmoe.data.records._TOGETHER", sum(map(len, lines[:3])))
    records = read_records(path, tokenizer, VOCAB, lambda *numbers: calls.append(numbers))
    for record, raw in zip(records, raws, strict=True):
        expected = tokenize_record(raw, tokenizer)
        assert record.tokens.tolist() == expected.tokens.tolist()
        assert record.weights.tolist() == expected.weights.tolist()
        assert record.splittable == expected.splittable
    size = sum(map(len, lines))
    assert calls == [(sum(map(len, lines[:3])), size, 3), (size, size, 4)]


def test_bad_file(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data.jsonl"
    with pytest.raises(UserError, match=r"file not found: .*data\.jsonl"):
        read_records(path, tokenizer, VOCAB)
    with pytest.raises(UserError, match="expected records, found a folder without any"):
        read_records(tmp_path, tokenizer, VOCAB)
    path.write_text(" \n\n")
    with pytest.raises(UserError, match=r"data\.jsonl: expected at least one record, found none"):
        read_records(path, tokenizer, VOCAB)
    path.write_text('{"text": "a"}\n')
    with pytest.raises(
        UserError, match=r"data\.jsonl:1: expected token ids below the model's vocab_size 258, found 258"
    ):
        read_records(path, tokenizer, 258)


OTHER_FILES = {
    "c.json": (b'{\r\n  "text": "a"\r\n}', "JSON that goes over several lines"),
    "a.arrow": (b"ARROW1\0\0", "an Arrow file .*from_file"),
    "a.zip": (b"PK\x03\x04", "a zip archive"),
    "a.csv": (b"text,label\na,b\n", "a table of text .*from_csv"),
    "a.txt": ('{"text": "a"}'.encode("utf-16"), "UTF-16 text .*iconv"),
    "a.zip.gz": (gzip.compress(b"PK\x03\x04"), "a zip archive"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_named(name: str, tokenizer: Any, tmp_path: pathlib.Path) -> None:
    content, message = OTHER_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: expected records in JSON \(.*\), found {message}"):
        read_records(tmp_path / name, tokenizer, VOCAB)


def test_captures_name_other_files(tokenizer: Any, tmp_path: pathlib.Path) -> None:
    """A capture reads any text, but .json as records, and nothing that is not text."""
    for name in ("a.zip", "c.json"):
        (tmp_path / name).write_bytes(OTHER_FILES[name][0])
        with pytest.raises(UserError, match=f"{name}: expected .*found {OTHER_FILES[name][1]}"):
            next(read_documents([tmp_path / name], tokenizer, VOCAB))
    (tmp_path / "a.csv").write_bytes(OTHER_FILES["a.csv"][0])
    assert next(read_documents([tmp_path / "a.csv"], tokenizer, VOCAB)).domain == "a"


def test_bad_tokenizer(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="folder not found: "):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"expected a tokenizer \(tokenizer\.json, or .*\), found none"):
        load_tokenizer(tmp_path)
    broken = {"{": r"tokenizer\.json: expected JSON", "{}": "expected a tokenizer, found none that can be loaded"}
    for text, says in broken.items():
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match=says) as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "eos_token"}))
    with pytest.raises(UserError, match="expected a tokenizer with an eos_token, found none"):
        load_tokenizer(tmp_path)


def numbered(lengths: list[int], splittable: bool = True) -> list[Record]:
    """Records whose tokens count upwards, a thousand apart: a label that is not input + 1 belongs to another record."""
    return [
        Record(np.arange(1000 * i, 1000 * i + n, dtype=np.int32), np.ones(n, np.float32), splittable)
        for i, n in enumerate(lengths, start=1)
    ]


def check_packing(lengths: list[int], seq_length: int, seed: int, pack: bool) -> None:
    """One epoch: every token that has a predecessor is predicted once, and no sequence mixes its documents."""
    documents, lost = cut(numbered(lengths), seq_length)
    assert lost.truncated == 0
    sequences = Sequences(documents, seq_length, seed=seed, pack=pack, epochs=1)
    assert sequences.packed or max(map(len, sequences.epoch(0))) == 1  # unless packed, one document per sequence
    predicted: list[int] = []
    for step in range(sequences.steps(1, 6)):
        batch = sequences.batch(step, (2, 3))
        arrays = jax.tree.leaves(batch)  # no experts: nothing is replayed
        assert [array.shape for array in arrays] == 5 * [(2, 3, seq_length)]
        for sequence in zip(*(array.reshape(-1, seq_length) for array in arrays), strict=True):
            ids, labels, weights, segment_ids, positions = sequence
            used = segment_ids > 0
            count = int(used.sum())
            assert used[:count].all(), "padding comes last"
            assert (np.diff(segment_ids[:count], prepend=0) >= 0).all()
            assert set(segment_ids[:count].tolist()) == set(range(1, len(set(segment_ids[:count].tolist())) + 1))
            for document in set(segment_ids[:count].tolist()):
                inside = segment_ids == document
                assert positions[inside].tolist() == list(range(int(inside.sum())))
                assert len(set((ids[inside] // 1000).tolist())) == 1
            assert (labels[used] == ids[used] + 1).all()
            assert (weights == used).all()
            assert not ids[~used].any() and not labels[~used].any() and not positions[~used].any()
            predicted += labels[used].tolist()
    assert sorted(predicted) == [1000 * i + j for i, n in enumerate(lengths, start=1) for j in range(1, n)]


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40).filter(lambda lengths: max(lengths) > 1)


@settings(max_examples=80, deadline=None)
@given(LENGTHS, st.integers(1, 40), st.integers(0, 3), st.booleans())
def test_packing(lengths: list[int], seq_length: int, seed: int, pack: bool) -> None:
    check_packing(lengths, seq_length, seed, pack)


def lose_one(plan: list[list[int]]) -> list[list[int]]:
    return [*plan[:-1], plan[-1][:-1]]


def repeat_one(plan: list[list[int]]) -> list[list[int]]:
    return [*plan, plan[0][:1]]


@pytest.mark.parametrize("fault", [lose_one, repeat_one])
def test_packing_that_loses_or_repeats_is_noticed(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *args: fault(right(*args)))
    with pytest.raises(AssertionError):
        check_packing([5, 9, 30, 2, 8], 16, 0, True)


def one_document(batch: Batch) -> Batch:
    return batch._replace(segment_ids=np.minimum(batch.segment_ids, 1))


def running_positions(batch: Batch) -> Batch:
    return batch._replace(position_ids=np.broadcast_to(np.arange(batch.labels.shape[-1]), batch.labels.shape))


def labels_of_the_sequence(batch: Batch) -> Batch:
    return batch._replace(labels=np.roll(batch.input_ids, -1, axis=-1))


@pytest.mark.parametrize("fault", [one_document, running_positions, labels_of_the_sequence])
def test_documents_that_run_together_are_noticed(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Sequences.batch
    monkeypatch.setattr(Sequences, "batch", lambda *args: fault(right(*args)))
    with pytest.raises(AssertionError):
        check_packing([5, 9, 30, 2, 8], 16, 0, True)


def test_batches_are_a_function_of_seed_and_step() -> None:
    documents, _ = cut(numbered([3, 9, 14, 2, 8, 8, 5, 11] * 6), 16)

    def batches(seed: int, order: list[int]) -> dict[int, bytes]:
        sequences = Sequences(documents, 16, seed=seed)
        return {step: b"".join(a.tobytes() for a in jax.tree.leaves(sequences.batch(step, (1, 4)))) for step in order}

    steps = list(range(20))  # more than one epoch
    forward = batches(0, steps)
    assert forward == batches(0, steps[::-1])
    assert forward != batches(1, steps)
    assert len(set(forward.values())) == len(steps), "an epoch is another order"


def test_epochs_follow_each_other_without_a_gap() -> None:
    documents, _ = cut(numbered([6] * 5), 5)
    sequences = Sequences(documents, 5, epochs=3)
    assert sequences.steps(3, 4) == 4
    batches = [sequences.batch(step, (4,)) for step in range(5)]
    used = [int((batch.segment_ids > 0).any(-1).sum()) for batch in batches]
    assert used == [4, 4, 4, 3, 0]
    assert np.bincount(np.concatenate([batch.labels[batch.weights > 0] for batch in batches])).max() == 3


def test_sequences_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.8, 3000), 2, 1000).astype(int).tolist()
    plan = packing.pack(lengths, 1024, rng)
    assert sum(lengths) / (1024 * len(plan)) > 0.97
    assert max(sum(lengths[i] for i in indices) for indices in plan) <= 1024


def test_long_records() -> None:
    documents, lost = cut(numbered([25]), 10)
    assert lost == (1, 0, 0)
    assert [len(d.inputs) for d in documents] == [10, 10, 4]
    assert np.concatenate([d.labels for d in documents]).tolist() == list(range(1001, 1025))

    documents, lost = cut(numbered([25, 11], splittable=False), 10)
    assert lost == (0, 1, 0)
    assert [d.labels.tolist() for d in documents] == [list(range(1001, 1011)), list(range(2001, 2011))]

    answer_too_late = Record(np.arange(20, dtype=np.int32), (np.arange(20) > 15).astype(np.float32), False)
    question_after = Record(np.arange(9, dtype=np.int32), (np.arange(9) == 4).astype(np.float32), False)
    documents, lost = cut([answer_too_late, question_after], 10)
    assert lost == (0, 1, 1)
    assert documents[0].labels.tolist() == [1, 2, 3, 4], "nothing is computed after the last learned token"
    assert len(lost.notices(10)) == 2

    later = Record(np.arange(40, dtype=np.int32), (np.arange(40) > 30).astype(np.float32), False)
    message = r"within seq_length 10: in all 2 records .* \(after 15 tokens in the shortest, 30 in the longest\)"
    with pytest.raises(UserError, match=f"expected at least one record with a token to learn, found none {message}"):
        cut([answer_too_late, later], 10)
    with pytest.raises(UserError, match=r"found none in 1 record$"):
        cut([Record(np.arange(9, dtype=np.int32), np.zeros(9, np.float32), True)], 10)
    with pytest.raises(UserError, match="expected at least one record with a token to learn, found none"):
        Sequences([], 10)


def test_hold_out() -> None:
    records = numbered(list(range(2, 42)))
    kept, held = hold_out(records, 0.1)
    assert len(held) == 4
    assert sorted(map(id, kept + held)) == sorted(map(id, records))
    assert digest(held) == digest(hold_out(records, 0.1)[1])
    assert digest(held) != digest(kept[:4])
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="eval_fraction: expected a number between 0 and 1"):
            hold_out(records, fraction)
    with pytest.raises(
        UserError, match="eval_fraction: expected records for training and for evaluation, found 1 in all"
    ):
        hold_out(records[:1], 0.5)


def test_nothing_is_said_about_pytorch_where_there_is_none(tmp_path: pathlib.Path) -> None:
    """jaxmoe needs no PyTorch, and an error is one line; transformers by itself does print a warning."""
    write_tokenizer(tmp_path)

    def said(load: str) -> str:
        code = f"import sys; sys.modules['torch'] = None\n{load}"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    assert "PyTorch" in said("from transformers import AutoTokenizer")
    assert said("from jaxmoe.data import load_tokenizer; load_tokenizer(sys.argv[1])") == ""
