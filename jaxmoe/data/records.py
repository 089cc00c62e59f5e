"""Files of records -> token ids and loss weights.

A record has one of the forms in `jaxmoe.data.record_forms`. A conversation is rendered by the checkpoint's own chat
template with the loss on the assistant's turns; a prompt with its completion has the loss on the completion; a text
has it on every token. A preference pair has it on both answers (`jaxmoe.data.pairs`).
"""

from __future__ import annotations

import hashlib
import logging
import pathlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int32

from jaxmoe.data.chat import AS_WRITTEN, ChatSettings, Piece, conversation_pieces, text_field
from jaxmoe.data.inputs import opened
from jaxmoe.data.pairs import PairTexts, pair_texts
from jaxmoe.data.raw import Input
from jaxmoe.data.record_forms import PAIRS, Columns, Recognised, recognised
from jaxmoe.errors import UserError, printable

_TOGETHER = 2**20  # bytes of records whose texts are encoded in one call: enough for many cores, little memory
OF_RECORDS = "records:"  # before a digest over the digests of records; that of earlier versions has none
_MOST_NAMES = 20  # of columns in a notice

T = TypeVar("T")
_log = logging.getLogger("jaxmoe")


@dataclass(frozen=True)
class Record:
    """One tokenised record: `weights[i]` is the loss weight of predicting `tokens[i]` from the tokens before it.

    `splittable` says what happens to a record that is longer than a sequence: it is cut into several documents (text)
    or truncated (everything else). A preference pair is the chosen answer with its prompt, and in `rejected` the other
    answer with the same prompt.
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    splittable: bool
    rejected: Record | None = None

    @property
    def sides(self) -> tuple[Record, ...]:
        """The record itself, and the rejected answer of a pair."""
        return (self,) if self.rejected is None else (self, self.rejected)


OnRead = Callable[[int, int | None, int], None]  # how much is read, of how much in all if known, records so far


@dataclass(frozen=True)
class Tokenising:
    """What turns a record into tokens: the tokenizer, the model's number of tokens, how conversations are rendered, and
    whether the records are preference pairs."""

    tokenizer: Any
    vocab_size: int
    settings: ChatSettings = AS_WRITTEN
    pairs: bool = False

    def check(self, record: Record, where: str) -> None:
        """Raises UserError, which starts with `where`, if the record has a token that the model does not know."""
        if (largest := max(int(side.tokens.max()) for side in record.sides)) >= self.vocab_size:
            wanted = f"token ids below the model's vocab_size {self.vocab_size}"
            raise UserError(f"{where}: expected {wanted}, found {largest}")


def read_records(
    path: str | pathlib.Path,
    tokenizer: Any,
    vocab_size: int,
    on_read: OnRead = lambda *_: None,
    settings: ChatSettings = AS_WRITTEN,
    *,
    pairs: bool = False,
) -> list[Record]:
    """Every record of a file, a folder or a data set (`jaxmoe.data.inputs`), tokenised. `on_read` reports progress;
    `settings` say how conversations are rendered; with `pairs` the records are preference pairs. A notice names columns
    that are not used.

    Raises:
        UserError: there is no such file, it holds no record, or a record is bad (the message starts with its place).
    """
    return read_input(opened(path), Tokenising(tokenizer, vocab_size, settings, pairs), on_read)


def read_input(source: Input, how: Tokenising, on_read: OnRead = lambda *_: None) -> list[Record]:
    """As `read_records`, of an input that is open."""
    records: list[Record] = []
    noticed = Noticed(source)
    for part, done in tokenised(source, how, noticed):
        records += part
        on_read(done, source.size, len(records))
    if not records:
        raise UserError(f"{source.name}: expected at least one record, found none")
    noticed.tell()
    return records


class Noticed:
    """What was noticed about an input: how many records have each form, and the columns that none of them used."""

    def __init__(self, source: Input) -> None:
        self._name = source.name
        self.forms: Counter[str] = Counter()
        self.unused = dict.fromkeys(source.unread)

    def add(self, found: Recognised) -> None:
        """One record."""
        self.forms[found.form.name] += 1
        if len(self.unused) < 10 * _MOST_NAMES:  # every record may bring others
            self.unused |= dict.fromkeys(found.ignored)

    def tell(self) -> None:
        """Logs a notice of unused columns, if there are any."""
        if self.unused:
            _log.warning(printable(f"{self._name}: columns that are not used: {self.unused_in_words()}"))

    def unused_in_words(self) -> str:
        """The unused columns, or some of very many."""
        names = list(self.unused)
        shown = ", ".join(name[:50] for name in names[:_MOST_NAMES])
        return shown + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")


def tokenised(source: Input, how: Tokenising, noticed: Noticed, first: int = 0) -> Iterator[tuple[list[Record], int]]:
    """The records of an input from number `first` on, many at a time: (records, how much of the input is read).

    Each record is recognised by itself and becomes one `Record`.

    Raises:
        UserError: a record is bad. An error in an earlier record is raised first.
    """
    waiting: list[tuple[str, _Draft | _PairDraft]] = []
    size = done = 0

    def encode() -> list[Record]:
        drafted, waiting[:] = list(waiting), []
        records = list(_encode([draft for _, draft in drafted], how.tokenizer))
        for (where, _), record in zip(drafted, records, strict=True):
            how.check(record, where)
        return records

    try:
        for raw in source.read(first):
            try:
                found = recognised(raw.value, PAIRS if how.pairs else None)
                waiting.append((raw.where, _draft(found.record, how.tokenizer, how.settings)))
            except UserError as error:
                raise UserError(f"{raw.where}: {error}") from None
            noticed.add(found)
            size, done = size + raw.size, raw.done
            if size >= _TOGETHER:
                size = 0
                yield encode(), done
    except UserError:
        encode()
        raise
    if waiting:
        yield encode(), done


def tokenize_record(raw: Any, tokenizer: Any, settings: ChatSettings = AS_WRITTEN) -> Record:
    """One parsed JSON value of any form in `jaxmoe.data.record_forms` -> tokens and loss weights.

    The chat template adds the special tokens of a conversation, and `eos_token` follows texts and completions
    that do not end in it. The tokenizer itself adds none (Qwen3 has no beginning-of-text token).

    Raises:
        UserError: not a record of a known kind, or one without a token to learn.
    """
    return next(_encode([_draft(recognised(raw).record, tokenizer, settings)], tokenizer))


def hold_out(records: Sequence[T], fraction: float) -> tuple[list[T], list[T]]:
    """(training records, held-out records), of records or their numbers. The choice depends only on how many there are,
    not on the run's seed, so that runs with different seeds are evaluated on the same text.

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


def hold_out_of_parts(parts: Sequence[Sequence[T]], fraction: float) -> tuple[list[list[T]], list[T]]:
    """As `hold_out`, of the records of several sources taken together; the training records stay apart by source.

    Raises:
        UserError: as `hold_out`, or a source without training records would be left.
    """
    together = [(number, record) for number, part in enumerate(parts) for record in part]
    kept, held = hold_out(together, fraction)
    left = [[record for owner, record in kept if owner == number] for number in range(len(parts))]
    if not all(left):
        raise UserError("eval_fraction: expected records for training in each source, found a source without any")
    return left, [record for _, record in held]


def digest(records: Iterable[Record], like: Any = None) -> str:
    """SHA-256 over that of each record: equal if two runs would train on the same data in the same order.

    Of the form of `like`, if that is the digest of an earlier version: over the tokens and weights of all records.
    """
    if isinstance(like, str) and not like.startswith(OF_RECORDS):
        total = hashlib.sha256()
        for record in records:
            _add(total, record)
        return total.hexdigest()
    return digest_of_records(map(record_digest, records))


def digest_of_records(digests: Iterable[bytes]) -> str:
    """The digest of the data from `record_digest` of each record, whoever formed it."""
    return OF_RECORDS + hashlib.sha256(b"".join(digests)).hexdigest()


def record_digest(record: Record) -> bytes:
    """SHA-256 over a record's tokens and weights."""
    found = hashlib.sha256()
    _add(found, record)
    return found.digest()


def _add(total: Any, record: Record) -> None:
    for side in record.sides:
        total.update(len(side.tokens).to_bytes(8, "little"))
        total.update(side.tokens.tobytes())
        total.update(side.weights.tobytes())


class _Draft(NamedTuple):
    """A record whose text is not yet encoded. Each piece is encoded separately, as in generation, where a prompt is
    encoded before its answer exists."""

    pieces: list[Piece]
    splittable: bool = False

    def texts(self) -> list[str]:
        """What is to be encoded."""
        return [piece for piece, _ in self.pieces if isinstance(piece, str)]

    def record(self, encoded: Iterator[list[int]]) -> Record:
        """The record, from the tokens of its texts."""
        tokens: list[int] = []
        weights: list[float] = []
        for piece, weight in self.pieces:
            ids = next(encoded) if isinstance(piece, str) else piece
            tokens += ids
            weights += [weight] * len(ids)
        return _record(tokens, weights, splittable=self.splittable)


class _PairDraft(NamedTuple):
    """A preference pair whose texts are not yet encoded. An answer is encoded together with its prompt and begins where
    the tokens of the prompt alone end, or where they first differ, as in TRL."""

    pair: PairTexts

    def texts(self) -> list[str]:
        """What is to be encoded."""
        return [*self.pair]

    def record(self, encoded: Iterator[list[int]]) -> Record:
        """The record, from the tokens of its texts."""
        prompt, chosen, rejected = (next(encoded) for _ in self.pair)
        shared = min(_shared(prompt, answer) for answer in (chosen, rejected))
        weights = lambda answer: [0.0] * shared + [1.0] * (len(answer) - shared)
        return _record(chosen, weights(chosen), rejected=_record(rejected, weights(rejected)))


def _record(
    tokens: list[int], weights: list[float], *, splittable: bool = False, rejected: Record | None = None
) -> Record:
    return Record(np.asarray(tokens, np.int32), np.asarray(weights, np.float32), splittable, rejected)


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def _draft(record: Columns, tokenizer: Any, settings: ChatSettings) -> _Draft | _PairDraft:
    """A record in one of the forms that are tokenised."""
    if "chosen" in record:
        return _PairDraft(pair_texts(record, tokenizer, settings))
    if "messages" in record:
        return _Draft(conversation_pieces(record["messages"], record.get("tools"), tokenizer, settings))
    if "prompt" in record:
        prompt, completion = text_field(record, "prompt"), text_field(record, "completion", empty=False)
        return _Draft([(prompt, 0.0), *_ended(completion, tokenizer)])
    return _Draft(_ended(text_field(record, "text", empty=False), tokenizer), splittable=True)


def _ended(text: str, tokenizer: Any) -> list[Piece]:
    """The learned text with `eos_token` after it, unless the text already ends in it."""
    if text.rstrip().endswith(tokenizer.eos_token):
        return [(text, 1.0)]
    return [(text, 1.0), ([tokenizer.eos_token_id], 1.0)]


def _encode(drafts: Sequence[_Draft | _PairDraft], tokenizer: Any) -> Iterator[Record]:
    """The records, with all texts encoded in one call, which uses all cores."""
    texts = [text for draft in drafts for text in draft.texts()]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    options["verbose"] = False  # its warning about long texts does not hold: they are cut later
    encoded = iter(tokenizer(texts, **options)["input_ids"] if texts else [])
    for draft in drafts:
        yield draft.record(encoded)
