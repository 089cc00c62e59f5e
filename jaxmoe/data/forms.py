"""Forms of data that are not read: what a file or a record is instead, and how to convert it."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterable

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
_MOST_FILES = 10_000  # how many files of a folder are looked at; it may be the whole disk
# how a name ends that is a file's, not a data set's on the hub
FILE_ENDINGS = (".jsonl", ".json", ".parquet", ".gz", ".zst", ".arrow", ".csv", ".tsv", ".txt")
_DATA_ENDINGS = (".parquet", ".arrow", ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst")
START = 4096  # bytes of a file that tell what it is
_OBJECT = "jq -c . {0} > data.jsonl"


def unread_text(start: bytes, name: str) -> str | None:
    """What a file is that begins with `start` (decompressed, without leading blanks), with a way to convert it; None if
    it may hold records in JSON."""
    if form := _binary(start, name):
        return form
    # A record on one line has its first key on that line.
    if start.startswith(b"{") and start[1:].lstrip(b" \t\r").startswith(b"\n"):
        return _in_words("JSON that goes over several lines", _OBJECT, name)
    if name.lower().endswith((".csv", ".tsv")) and not start.startswith((b"{", b"[")):
        return _in_words("a table of text", "datasets.Dataset.from_csv('{0}').to_json('data.jsonl')", name)
    return None


def binary_file(path: pathlib.Path) -> str | None:
    """What the file `path` is, with a way to convert it, if its first bytes show that it is not UTF-8 text."""
    return _binary(first_bytes(path), str(path))


def _binary(start: bytes, name: str) -> str | None:
    for first, what, command in _FIRST_BYTES:
        if start.startswith(first):
            return _in_words(what, command, name)
    return None


def holds_data(folder: pathlib.Path) -> bool:
    """Whether a folder, at any depth, holds files of records as data sets of the hub do."""
    walked = (name for _, _, names in os.walk(folder) for name in names)
    return any(name.endswith(_DATA_ENDINGS) for name in itertools.islice(walked, _MOST_FILES))


def missing_file(path: pathlib.Path) -> str:
    """That there is no such file."""
    return (
        f"{path}: expected a file, found a pipe, a socket or a device" if path.exists() else f"file not found: {path}"
    )


def unread_record(keys: Iterable[str]) -> str:
    """What a record with these keys is, with a way to convert it; empty if the keys tell nothing."""
    found = set(keys)
    if {"chosen", "rejected"} <= found:
        return "pairs of answers: --loss dpo or --loss orpo learns from them"
    for prompt, answer in (("question", "answer"), ("query", "response"), ("prompt", "response"), ("input", "output")):
        if {prompt, answer} <= found:
            return f'write "prompt" ({prompt}) and "completion" ({answer})'
    return ""


def first_bytes(path: pathlib.Path) -> bytes:
    """The start of a file, at most `START` bytes."""
    with path.open("rb") as file:
        return file.read(START)


def _in_words(what: str, command: str, name: str) -> str:
    return f"{what} (convert it: {command.format(name)})"
