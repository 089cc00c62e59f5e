"""JSONL files -> records: token ids and loss weights.

A line holds one record of one of these kinds: `{"messages": [...]}` (optionally with `"tools"`), rendered by the
checkpoint's own chat template with the loss on the assistant's turns; `{"prompt": ..., "completion": ...}` with the
loss on the completion; `{"text": ...}` with the loss on every token.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from jaxmoe.data import forms
from jaxmoe.data.chat import AS_WRITTEN, ChatSettings, Piece, conversation_pieces, kind_of, text_field
from jaxmoe.errors import UserError
from jaxmoe.json_text import parse_json

MAX_LINE = 16 * 2**20  # bytes; a record of this length has some four million tokens
_TOGETHER = 2**20  # bytes of a file whose texts are encoded in one call: enough for many cores, little memory


@dataclass(frozen=True)
class Record:
    """One tokenised line: `weights[i]` is the loss weight of predicting `tokens[i]` from the tokens before it.

    `splittable` says what happens to a record that is longer than a sequence: it is cut into several documents (text)
    or truncated (everything else).
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    splittable: bool


OnRead = Callable[[int, int, int], None]  # bytes read, bytes of the file, records so far


def read_records(
    path: str | pathlib.Path,
    tokenizer: Any,
    vocab_size: int,
    on_read: OnRead = lambda *_: None,
    settings: ChatSettings = AS_WRITTEN,
) -> list[Record]:
    """Every record of a JSONL file, tokenised; blank lines are skipped. `on_read` reports progress; `settings` say how
    conversations are rendered.

    Raises:
        UserError: the file is missing, holds no record, or a line is bad (the message starts with FILE:LINE).
    """
    path = pathlib.Path(path)
    records: list[Record] = []
    waiting: list[tuple[str, _Draft]] = []
    encoded_to = 0

    def encode() -> None:
        drafted, waiting[:] = list(waiting), []
        encoded = _encode([draft for _, draft in drafted], tokenizer)
        for (where, _), record in zip(drafted, encoded, strict=True):
            largest = int(record.tokens.max())
            if largest >= vocab_size:
                wanted = f"token ids below the model's vocab_size {vocab_size}"
                raise UserError(f"{where}: expected {wanted}, found {largest}")
            records.append(record)

    try:
        for where, raw, end in read_lines(path):
            try:
                waiting.append((where, _draft(raw, tokenizer, settings)))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if end - encoded_to >= _TOGETHER:
                encode()
                encoded_to = end
                on_read(end, path.stat().st_size, len(records))
    except UserError:
        encode()  # an error in an earlier line is reported first
        raise
    encode()
    if not records:
        raise UserError(f"{path}: expected at least one record, found none")
    return records


def tokenize_record(raw: Any, tokenizer: Any, settings: ChatSettings = AS_WRITTEN) -> Record:
    """One parsed JSON value -> tokens and loss weights.

    The chat template adds the special tokens of a conversation, and `eos_token` follows texts and completions
    that do not end in it. The tokenizer itself adds none (Qwen3 has no beginning-of-text token).

    Raises:
        UserError: not a record of a known kind, or one without a token to learn.
    """
    return next(_encode([_draft(raw, tokenizer, settings)], tokenizer))


def hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """(training records, held-out records). The choice depends only on the number of records, not on the run's seed,
    so that runs with different seeds are evaluated on the same text.

    Raises:
        UserError: a fraction outside (0, 1), or one of the two parts would be empty.
    """
    if not 0 < fraction < 1:
        raise UserError(f"eval_fraction: expected a number between 0 and 1, found {fraction!r}")
    count = max(1, round(len(records) * fraction))
    if count >= len(records):
        raise UserError(f"eval_fraction: expected records for training and for evaluation, found {len(records)} in all")
    held = set(np.random.default_rng(0).permutation(len(records))[:count].tolist())
    return (
        [record for i, record in enumerate(records) if i not in held],
        [record for i, record in enumerate(records) if i in held],
    )


def digest(records: Iterable[Record]) -> str:
    """SHA-256 over tokens and weights: equal if two runs would train on the same data in the same order."""
    total = hashlib.sha256()
    for record in records:
        total.update(len(record.tokens).to_bytes(8, "little"))
        total.update(record.tokens.tobytes())
        total.update(record.weights.tobytes())
    return total.hexdigest()


def read_lines(path: pathlib.Path) -> Iterator[tuple[str, Any, int]]:
    """(`FILE:LINE`, parsed JSON, bytes of the file up to the line's end) for every line that is not blank.

    Raises:
        UserError: the file is missing or of another form, or a line is not UTF-8 or not JSON.
    """
    if path.is_dir():
        raise UserError(f"{path}: expected a JSONL file, found {forms.unread_folder(path)}")
    if not path.is_file():
        raise UserError(forms.missing_file(path))
    if form := forms.unread_file(path):
        raise UserError(f"{path}: expected a JSONL file (one record a line), found {form}")
    end = 0
    with path.open("rb") as file:
        # A line is read only up to the limit: a file without line ends must not fill the memory.
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}:{number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{where}: expected a line of at most {MAX_LINE >> 20} MiB, found a longer one")
            end += len(line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: expected UTF-8, found byte 0x{line[error.start]:02x} at byte {error.start + 1}"
                ) from None
            if not text.strip():
                continue
            yield where, parse_json(text, where), end


class _Draft(NamedTuple):
    """A record whose text is not yet encoded. Each piece is encoded separately, as in generation, where a prompt is
    encoded before its answer exists."""

    pieces: list[Piece]
    splittable: bool = False


def _draft(raw: Any, tokenizer: Any, settings: ChatSettings) -> _Draft:
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object, found {kind_of(raw)}")
    keys = set(raw)
    if "messages" in keys and keys <= {"messages", "tools"}:
        return _Draft(conversation_pieces(raw["messages"], raw.get("tools"), tokenizer, settings))
    if keys == {"prompt", "completion"}:
        prompt, completion = text_field(raw, "prompt"), text_field(raw, "completion", empty=False)
        return _Draft([(prompt, 0.0), *_ended(completion, tokenizer)])
    if keys == {"text"}:
        return _Draft(_ended(text_field(raw, "text", empty=False), tokenizer), splittable=True)
    found = ", ".join(json.dumps(key) for key in raw) or "none"
    form = forms.unread_record(keys)
    raise UserError(
        'expected the keys "messages" (and "tools"), "prompt" and "completion", or "text"; '
        f"found {found}{f' ({form})' if form else ''}"
    )


def _ended(text: str, tokenizer: Any) -> list[Piece]:
    """The learned text with `eos_token` after it, unless the text already ends in it."""
    if text.rstrip().endswith(tokenizer.eos_token):
        return [(text, 1.0)]
    return [(text, 1.0), ([tokenizer.eos_token_id], 1.0)]


def _encode(drafts: Sequence[_Draft], tokenizer: Any) -> Iterator[Record]:
    """The records, with all texts encoded in one call, which uses all cores."""
    texts = [piece for draft in drafts for piece, _ in draft.pieces if piece and isinstance(piece, str)]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    encoded = iter(tokenizer(texts, **options)["input_ids"] if texts else [])
    for draft in drafts:
        tokens: list[int] = []
        weights: list[float] = []
        for piece, weight in draft.pieces:
            if isinstance(piece, str):
                ids = next(encoded) if piece else []
            else:
                ids = piece
            tokens += ids
            weights += [weight] * len(ids)
        yield Record(np.asarray(tokens, np.int32), np.asarray(weights, np.float32), draft.splittable)
