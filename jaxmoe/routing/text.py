"""Text and record files -> the labelled stream of tokens that a capture runs on.

Files of training records (`jaxmoe.data.inputs`) are known by their ending (`.jsonl`, `.json`, `.parquet`, compressed or
not) or by how they begin; any other file is one text. A record may have a "domain"; one without gets its file's name
without the ending. The tokens are exactly those that training sees, so that training can replay a captured routing.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from captures import ROLES, LabelledText, Text, tokenizer_digest
from jaxmoe.data import forms
from jaxmoe.data.chat import AS_WRITTEN, ChatSettings, assistant_spans
from jaxmoe.data.compressed import ENDINGS, GZIP, ZSTD
from jaxmoe.data.inputs import check_split, opened
from jaxmoe.data.record_forms import recognised
from jaxmoe.data.records import Noticed, Record, tokenize_record
from jaxmoe.data.tables import PARQUET
from jaxmoe.errors import UserError

_MAX_TEXT = 100 * 2**20  # bytes of a plain text, which is one record and is encoded as a whole


class Document(NamedTuple):
    """One record: its tokens, the index of each one's role in `ROLES`, and its domain."""

    tokens: Int32[np.ndarray, " n"]
    roles: Int32[np.ndarray, " n"]
    domain: str


def read_documents(
    paths: Sequence[str | pathlib.Path],
    tokenizer: Any,
    vocab_size: int,
    settings: ChatSettings = AS_WRITTEN,
    *,
    split: str | None = None,
) -> Iterator[Document]:
    """Every record of every file, tokenised and labelled; `settings` say how conversations are rendered,
    `split` which part of a data set is read.

    Raises:
        UserError: a missing file, a bad record (FILE:LINE first), a token that the model does not know.
    """
    check_split(paths, split, "split")
    for path in map(pathlib.Path, paths):
        for where, raw, domain in _raw_records(path, split):
            try:
                document = label(raw, tokenizer, domain, settings)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if (largest := int(document.tokens.max())) >= vocab_size:
                raise UserError(
                    f"{where}: expected token ids below the model's vocab_size {vocab_size}, found {largest}"
                )
            yield document


def label(raw: Any, tokenizer: Any, domain: str, settings: ChatSettings = AS_WRITTEN) -> Document:
    """One record's tokens, as `jaxmoe.data.records.tokenize_record` makes them, and each one's role."""
    raw = recognised(raw).record
    record = tokenize_record(raw, tokenizer, settings)
    if "messages" in raw:
        names = _chat_roles(raw["messages"], raw.get("tools"), tokenizer, record, settings)
    elif "prompt" in raw:
        names = ["completion" if weight else "prompt" for weight in record.weights]
    else:
        assert "text" in raw, f"roles of this kind of record are unknown: {', '.join(raw)}"
        names = ["text"] * len(record.tokens)
    return Document(record.tokens, np.asarray([ROLES.index(name) for name in names], np.int32), domain)


def labelled_text(documents: Iterable[Document], seq_length: int, tokenizer: str) -> LabelledText:
    """Joins documents into one stream.

    A document of more than `seq_length` tokens becomes consecutive contexts of that length, as in training.
    `tokenizer` is a digest (`captures.tokenizer_digest`).

    Raises:
        UserError: no document.
    """
    domains: dict[str, int] = {}
    parts = []
    for number, (tokens, roles, domain) in enumerate(documents):
        n = len(tokens)
        same = np.full(n, domains.setdefault(domain, len(domains)), np.int32)
        following = np.append(tokens[1:], -1).astype(np.int32)
        position = np.arange(n, dtype=np.int32) % seq_length
        parts.append(Text(tokens, np.full(n, number, np.int32), position, same, roles, following))
    if not parts:
        raise UserError("data: expected at least one record, found none")
    text = Text(*map(np.concatenate, zip(*parts, strict=True)))
    return LabelledText(text, tuple(domains), ROLES, seq_length, tokenizer)


def read_text(
    paths: Sequence[str | pathlib.Path],
    tokenizer: Any,
    vocab_size: int,
    seq_length: int,
    limit: int | None = None,
    settings: ChatSettings = AS_WRITTEN,
    *,
    split: str | None = None,
) -> LabelledText:
    """The files as one labelled stream, which ends after the record that reaches `limit` tokens."""

    def limited() -> Iterator[Document]:
        total = 0
        for document in read_documents(paths, tokenizer, vocab_size, settings, split=split):
            yield document
            total += len(document.tokens)
            if limit is not None and total >= limit:
                return

    return labelled_text(limited(), seq_length, tokenizer_digest(tokenizer))


def _raw_records(path: pathlib.Path, split: str | None) -> Iterator[tuple[str, Any, str]]:
    """(where, record without its domain, domain)."""
    if _is_plain_text(path):
        yield str(path), {"text": _whole_text(path)}, path.stem
        return
    source = opened(path, split)
    noticed = Noticed(source)
    usual = path.name.partition(".")[0] or path.name
    for where, raw, *_ in source.read(0):
        domain = usual
        if isinstance(raw, dict) and raw.get("domain") is not None:
            domain = raw["domain"]
            if not isinstance(domain, str) or not domain:
                raise UserError(f"{where}: domain: expected a name, found {domain!r}")
        try:
            found = recognised(raw)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        noticed.add(found._replace(ignored=tuple(name for name in found.ignored if name != "domain")))
        yield where, found.record, domain
    noticed.tell()


def _is_plain_text(path: pathlib.Path) -> bool:
    """Whether a file is one text: it has no ending of a file of records, and does not begin as compressed ones or
    Parquet do."""
    endings = (".jsonl", ".json", *(f".{form}{end}" for form in ("jsonl", "json") for end in ENDINGS), ".parquet")
    if not path.is_file() or path.name.endswith(endings):
        return False
    return not forms.first_bytes(path).startswith((GZIP, ZSTD, PARQUET))


def _whole_text(path: pathlib.Path) -> str:
    if (size := path.stat().st_size) > _MAX_TEXT:
        raise UserError(
            f"{path}: expected at most {_MAX_TEXT >> 20} MiB of text, found {size >> 20:,}; divide it into files"
        )
    if form := forms.binary_file(path):
        raise UserError(f"{path}: expected a text or records, found {form}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, found another encoding at byte {error.start + 1}") from None


def _chat_roles(messages: Any, tools: Any, tokenizer: Any, record: Record, settings: ChatSettings) -> list[str]:
    """The role of each token of a conversation.

    The tokens to be learned are the assistant's. Tokens of another message's content, found in the rendered text, have
    that message's role. All others are the template's.
    """
    roles = ["assistant" if weight else "template" for weight in record.weights]
    whole, spans = assistant_spans(messages, tools, tokenizer, settings)
    pieces, at = [], 0
    for start, end in [*spans, (len(whole), len(whole))]:
        pieces += [(at, start), (start, end)]
        at = end
    offsets: list[tuple[int, int]] = []
    tokens: list[int] = []
    for start, end in pieces:
        if start < end:
            encoded = tokenizer(whole[start:end], add_special_tokens=False, return_offsets_mapping=True)
            tokens += encoded["input_ids"]
            offsets += [(start + a, start + b) for a, b in encoded["offset_mapping"]]
    if not np.array_equal(tokens, record.tokens):
        return roles  # The template tokenises by itself: only the learned tokens are known.
    at = 0
    for message in settings.messages(messages):
        content = (message.get("content") or "").strip()
        begin = whole.find(content, at) if content else -1
        if begin < 0:
            continue
        at = begin + len(content)
        if message["role"] != "assistant":
            for i, (a, b) in enumerate(offsets):
                if begin <= a and b <= at and a < b:
                    roles[i] = message["role"]
    return roles
