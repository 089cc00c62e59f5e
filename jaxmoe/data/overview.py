"""What a model would see of some data: its first records token by token, counts, lengths, what is cut, what packing
wastes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxmoe.data.packing import Cut, divide, pack
from jaxmoe.data.raw import Input
from jaxmoe.data.record_forms import PAIRS, recognised
from jaxmoe.data.records import Noticed, OnRead, Record, Tokenising, tokenised
from jaxmoe.errors import UserError, counted

PLAIN, TRAINED, CUT = "plain", "trained", "cut"


class Piece(NamedTuple):
    """Consecutive tokens of one kind as text: `PLAIN`, `TRAINED`, or `CUT` (they do not fit)."""

    text: str
    kind: str


class Example(NamedTuple):
    """A record as the model sees it."""

    where: str
    form: str
    tokens: int
    trained: int
    pieces: list[Piece]
    more: int  # tokens that are not shown


@dataclass(frozen=True)
class Overview:
    """What is known after all records were read; numbers of tokens are those of whole records."""

    forms: dict[str, int]
    unused: list[str]  # for each input with unused columns, a line
    lengths: Int[np.ndarray, " records"]  # two of a preference pair
    trained: int
    trained_kept: int  # of the trained tokens, those that fit
    cut: Cut
    documents: int
    used: int  # tokens in sequences
    sequences: int
    seq_length: int

    @property
    def tokens(self) -> int:
        """Of all records."""
        return int(self.lengths.sum())

    def wasted(self, sequences: int) -> float:
        """The share of padding if the documents fill so many sequences."""
        return 1 - self.used / (sequences * self.seq_length) if sequences else 0.0

    def table(self) -> list[tuple[str, str]]:
        """(name, value) of each number, in words."""
        at = lambda share: f"{int(np.quantile(self.lengths, share, method='nearest')):,}"
        records = sum(self.forms.values())
        each = "record" if len(self.lengths) == records else "answer with its prompt"
        lines = [
            ("records", f"{records:,} ({', '.join(f'{form}: {n:,}' for form, n in self.forms.items())})"),
            *(("columns that are not used", line) for line in self.unused),
            ("tokens", f"{self.tokens:,}, of which {self.trained:,} ({_share(self.trained, self.tokens)}) are trained"),
            (f"tokens per {each}", f"{at(0)} to {at(1)}, half of them up to {at(0.5)}, 95 % up to {at(0.95)}"),
            *(("cut", line) for line in self.cut.notices(self.seq_length)),
            ("trained tokens cut off", _of(self.trained - self.trained_kept, self.trained)),
            (
                "sequences an epoch",
                f"{self.sequences:,} of {self.seq_length:,} tokens, for {counted(self.documents, 'document')}",
            ),
            (
                "padding",
                " packed, ".join(map(percent, map(self.wasted, (self.sequences, self.documents)))) + " with --no-pack",
            ),
        ]
        return lines


def _share(part: int, whole: int) -> str:
    return percent(part / whole if whole else 0.0)


def percent(share: float) -> str:
    """With one decimal; what is not all and not nothing is not rounded to these."""
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{100 * min(max(share, 0.001), 0.999):.1f} %"


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({_share(part, whole)})" if part else "none"


def overview(inputs: Sequence[Input], how: Tokenising, seq_length: int, limit: int | None, on_read: OnRead) -> Overview:
    """Reads all records, or the first `limit` of each input.

    Raises:
        UserError: a bad record, or none.
    """
    records: list[Record] = []
    noticed = [Noticed(each) for each in inputs]
    for source, names in zip(inputs, noticed, strict=True):
        before = len(records)
        for part, done in tokenised(_beginning(source, limit), how, names):
            records += part
            on_read(done, source.size, len(records))
        if len(records) == before:
            raise UserError(f"{source.name}: expected at least one record, found none")
    documents, cut = divide(records, seq_length)
    lengths = [document.length for document in documents]
    forms: dict[str, int] = {}
    for each in noticed:
        for form, count in each.forms.items():
            forms[form] = forms.get(form, 0) + count
    sides = [side for record in records for side in record.sides]
    return Overview(
        forms=forms,
        unused=[each.unused_in_words() for each in noticed if each.unused],
        lengths=np.asarray([len(side.tokens) for side in sides]),
        trained=sum(int(np.count_nonzero(side.weights[1:])) for side in sides),
        trained_kept=sum(int(np.count_nonzero(side.weights)) for document in documents for side in document.sides),
        cut=cut,
        documents=len(documents),
        used=sum(lengths),
        sequences=len(pack(lengths, seq_length, np.random.default_rng((0, 0)))),
        seq_length=seq_length,
    )


def _beginning(source: Input, limit: int | None) -> Input:
    return source if limit is None else replace(source, read=lambda first: itertools.islice(source.read(first), limit))


def examples(source: Input, how: Tokenising, seq_length: int, count: int, most: int) -> list[Example]:
    """The first `count` records of an input, each with at most `most` of its tokens as text.

    Raises:
        UserError: a bad record.
    """
    found = []
    one_by_one = itertools.islice(source.read(0), count)
    for raw in one_by_one:
        try:
            form = recognised(raw.value, PAIRS if how.pairs else None).form.name
        except UserError as error:
            raise UserError(f"{raw.where}: {error}") from None
        alone = Input(source.name, lambda _, raw=raw: iter([raw]))
        ((records, _),) = tokenised(alone, how, Noticed(alone))
        names = (f"{form}, chosen", f"{form}, rejected") if how.pairs else (form,)
        for name, side in zip(names, records[0].sides, strict=True):
            found.append(_example(side, raw.where, name, how.tokenizer, seq_length, most))
    return found


def _example(record: Record, where: str, form: str, tokenizer: Any, seq_length: int, most: int) -> Example:
    kinds = [TRAINED if weight else PLAIN for weight in record.weights]
    if not record.splittable:
        # The token at this place is still predicted; its own successor is not.
        kinds[seq_length + 1 :] = [CUT] * len(kinds[seq_length + 1 :])
    pieces, at = [], 0
    for kind, run in itertools.groupby(kinds[:most]):
        length = len(list(run))
        pieces.append(Piece(tokenizer.decode(record.tokens[at : at + length].tolist()), kind))
        at += length
    trained = int(np.count_nonzero(record.weights))
    return Example(where, form, len(kinds), trained, pieces, max(0, len(kinds) - most))
