"""Forms of data that are not read: what a file or a record is instead, and how to convert it."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterable
from typing import Any

# first bytes of a file -> (what it is, how to make a JSONL file of it; {0} is the file)
_FIRST_BYTES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip-compressed data", "gunzip --keep {0}"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed data", "unzstd {0}"),
    (b"BZh", "bzip2-compressed data", "bunzip2 --keep {0}"),
    (b"\xfd7zXZ", "xz-compressed data", "unxz --keep {0}"),
    (b"PK\x03\x04", "a zip archive", "unzip {0}"),
    (b"PAR1", "a Parquet file", "datasets.Dataset.from_parquet('{0}').to_json('data.jsonl')"),
    (b"ARROW1", "an Arrow file", "datasets.Dataset.from_file('{0}').to_json('data.jsonl')"),
    (b"\xff\xff\xff\xff", "an Arrow file", "datasets.Dataset.from_file('{0}').to_json('data.jsonl')"),
    (b"SQLite format 3", "an SQLite database", "datasets.Dataset.from_sql(...).to_json('data.jsonl')"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {0} > data.jsonl"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {0} > data.jsonl"),
)
# name of a file in a folder, or how one at any depth ends -> what the folder is, how to make a JSONL file of it
_FOLDERS = (
    (
        "dataset_dict.json",
        "a datasets folder with splits",
        "datasets.load_from_disk('{0}')['train'].to_json('data.jsonl')",
    ),
    ("dataset_info.json", "a datasets folder", "datasets.load_from_disk('{0}').to_json('data.jsonl')"),
    (".parquet", "a folder of Parquet files", "datasets.load_dataset('{0}', split='train').to_json('data.jsonl')"),
    (".arrow", "a folder of Arrow files", "datasets.load_dataset('{0}', split='train').to_json('data.jsonl')"),
)
_MOST_FILES = 10_000  # how many files of a folder are looked at; it may be the whole disk
_ARRAY = "jq -c '.[]' {0} > data.jsonl"
_OBJECT = "jq -c . {0} > data.jsonl"


def unread_file(path: pathlib.Path) -> str | None:
    """What the file `path` is, with a way to convert it; None if it may hold one JSON value a line."""
    if form := binary_file(path):
        return form
    text = first_bytes(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return _in_words("a JSON array", _ARRAY, path)
    # A record on one line has its first key on that line.
    if text.startswith(b"{") and text[1:].lstrip(b" \t\r").startswith(b"\n"):
        return _in_words("JSON that goes over several lines", _OBJECT, path)
    if path.suffix.lower() in (".csv", ".tsv") and not text.startswith(b"{"):
        return _in_words("a table of text", "datasets.Dataset.from_csv('{0}').to_json('data.jsonl')", path)
    return None


def binary_file(path: pathlib.Path) -> str | None:
    """What the file `path` is, with a way to convert it, if its first bytes show that it is not UTF-8 text."""
    start = first_bytes(path)
    for first, what, command in _FIRST_BYTES:
        if start.startswith(first):
            return _in_words(what, command, path)
    return None


def unread_folder(path: pathlib.Path) -> str:
    """What the folder `path` is, with a way to convert it."""
    walked = (name for _, _, names in os.walk(path) for name in names)
    endings = {os.path.splitext(name)[1] for name in itertools.islice(walked, _MOST_FILES)}
    for name, what, command in _FOLDERS:
        if name in endings or (path / name).is_file():
            return _in_words(f"a folder: {what}", command, path)
    return "a folder"


def missing_file(path: pathlib.Path) -> str:
    """That there is no such file; with a way to convert if the name may be a data set's on the Hugging Face hub."""
    if path.exists():
        return f"{path}: expected a file, found a pipe, a socket or a device"
    words = f"file not found: {path}"
    if len(path.parts) == 2 and not path.suffix and not path.is_absolute() and not path.parent.exists():
        command = f"datasets.load_dataset('{path}', split='train').to_json('data.jsonl')"
        words += f" (a data set of the hub is converted with {command})"
    return words


def unread_record(keys: Iterable[str]) -> str:
    """What a record with these keys is, with a way to convert it; empty if the keys tell nothing."""
    found = set(keys)
    chat = 'write "messages": [{"role": "user" or "assistant", "content": ...}, ...]'
    if "conversations" in found or "conversation" in found:
        return f"ShareGPT's form: {chat}"
    if {"instruction", "output"} <= found:
        return 'Alpaca\'s form: write "prompt" (instruction and input) and "completion" (output)'
    if {"chosen", "rejected"} <= found:
        return "pairs of answers: only one answer per record can be learned"
    if "messages" in found:
        return 'only "tools" may stand beside "messages": leave the other columns out'
    for prompt, answer in (("question", "answer"), ("query", "response"), ("prompt", "response"), ("input", "output")):
        if {prompt, answer} <= found:
            return f'write "prompt" ({prompt}) and "completion" ({answer})'
    for known in ({"prompt", "completion"}, {"text"}):
        if known < found:
            return f"leave the other columns than {' and '.join(sorted(known, reverse=True))} out"
    return ""


def unread_message(message: dict[str, Any]) -> str:
    """What a message with other keys than ours is, with a way to convert it; empty if the keys tell nothing."""
    if {"from", "value"} <= set(message):
        return '; ShareGPT\'s form: "from" is "role" (human: user, gpt: assistant), "value" is "content"'
    return ""


def first_bytes(path: pathlib.Path) -> bytes:
    """The start of a file, at most 4096 bytes."""
    with path.open("rb") as file:
        return file.read(4096)


def _in_words(what: str, command: str, path: pathlib.Path) -> str:
    return f"{what} (convert it: {command.format(path)})"
