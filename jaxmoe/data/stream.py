"""Records that are read while the run trains: shuffled and packed in windows, in an order that a run can resume.

A window is a number of consecutive records. Its documents are shuffled and packed as those of an epoch are. Which
batches come depends only on the records, the seed and the size of the window: not on the form of the files, nor on when
a window is read. A position says where a stream is, so that a resumed run reads nothing twice but the window it was in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmoe.data.mixture import next_source
from jaxmoe.data.packing import Batch, Cut, Document, LinesOf, Sequences, divide, nothing_fits, pack
from jaxmoe.data.raw import Input
from jaxmoe.data.records import Noticed, Record, Tokenising, digest, tokenised
from jaxmoe.errors import UserError

_FRUITLESS = 1000  # records without a token to learn after which a stream ends
Position = dict[str, Any]  # what JSON can hold


@dataclass(frozen=True)
class Places:
    """How far each source is read: how many records in all, and where in it."""

    taken: tuple[int, ...]
    at: tuple[int, ...]


@dataclass(frozen=True)
class _Window:
    """The sequences of one window; `places` is where its records begin."""

    number: int
    places: Places
    sequences: list[list[Document]]
    cut: Cut
    digest: str


class Stream:
    """An endless stream of packed sequences, read in batches. When a source ends, it begins again.

    The next window is read and tokenised in a thread while the current one is used.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        how: Tokenising,
        seq_length: int,
        *,
        weights: Sequence[float] | None = None,
        window: int,
        seed: int = 0,
        pack: bool = True,
    ) -> None:
        """`weights` are the shares of the sources (default: equal ones), `window` is a number of records.

        Reads the first window.

        Raises:
            UserError: a bad record, or none with a token to learn.
        """
        self.packed = pack
        self._inputs, self._how, self._seq_length = inputs, how, seq_length
        self._weights = list(weights or [1.0] * len(inputs))
        self._size, self._seed = window, seed
        self._noticed = [Noticed(each) for each in inputs]
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self._closed = False
        self._next: Future[_Window] | None = None
        self._go_to(0, Places((0,) * len(inputs), (0,) * len(inputs)))
        self.cut, self.digest = self._window.cut, self._window.digest  # of the first window
        for noticed in self._noticed:
            noticed.tell()

    def batch(self, step: int, shape: tuple[int, ...], lines_of: LinesOf = lambda shape: None) -> Batch:
        """Batch number `step` (from 0) with leading axes `shape`, for instance (accumulation, B); `lines_of` is that of
        `Sequences.batch`.

        Any step may be asked for, but only the next one is quick.
        """
        size = int(np.prod(shape))
        if step * size != self._passed:
            self._skip_to(step * size)
        return self._of(list(itertools.islice(self._sequences(), size)), shape, lines_of)

    def position(self) -> Position:
        """Where the next batch begins."""
        places = self._window.places
        return {
            "sequences": self._passed,
            "window": self._window.number,
            "used": self._used,
            "taken": list(places.taken),
            "at": list(places.at),
        }

    def restore(self, position: Position) -> None:
        """Goes to where a stream of the same data was."""
        places = Places(tuple(position["taken"]), tuple(position["at"]))
        if position["window"] != self._window.number:
            self._go_to(position["window"], places)
        self._passed, self._used = position["sequences"], position["used"]

    def close(self) -> None:
        """Stops reading ahead."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _of(self, sequences: list[list[Document]], shape: tuple[int, ...], lines_of: LinesOf) -> Batch:
        numbers = itertools.count()
        plan = [[next(numbers) for _ in sequence] for sequence in sequences]
        documents = list(itertools.chain.from_iterable(sequences))
        return Sequences.planned(documents, plan, self._seq_length).batch(0, shape, lines_of)

    def _sequences(self) -> Iterator[list[Document]]:
        while True:
            while self._used == len(self._window.sequences):
                assert self._next is not None
                self._begin(self._next.result())
            self._used, self._passed = self._used + 1, self._passed + 1
            yield self._window.sequences[self._used - 1]

    def _skip_to(self, sequence: int) -> None:
        if sequence < self._passed:
            if self._passed - sequence <= self._used:  # in the same window
                self._used, self._passed = self._used - (self._passed - sequence), sequence
                return
            zeros = (0,) * len(self._inputs)
            self._go_to(0, Places(zeros, zeros))
        for _ in itertools.islice(self._sequences(), sequence - self._passed):
            pass

    def _go_to(self, number: int, places: Places) -> None:
        """Starts at a window whose records begin at `places`."""
        if self._next is not None:
            self._closed = True  # what is being read ahead is not needed
            self._next.exception()
            self._closed = False
        self._reader = _Records(self._inputs, self._how, self._weights, places, self._noticed)
        self._passed = 0
        self._begin(self._read(number))

    def _begin(self, window: _Window) -> None:
        self._window, self._used = window, 0
        self._next = self._pool.submit(self._read, window.number + 1)

    def _read(self, number: int) -> _Window:
        """The next window that has a document; it is numbered `number`."""
        fruitless: list[Record] = []
        while True:
            places = self._reader.places
            records = []
            for record in itertools.islice(self._reader, self._size):
                if self._closed:
                    raise UserError("data: the run has ended")
                records.append(record)
            documents, cut = divide(records, self._seq_length)
            if documents:
                break
            fruitless += records
            if len(fruitless) >= max(_FRUITLESS, self._size):
                raise UserError(nothing_fits(fruitless, self._seq_length))
        rng = np.random.default_rng((self._seed, number))
        lengths = [document.length for document in documents]
        plan = (
            pack(lengths, self._seq_length, rng) if self.packed else rng.permutation(len(documents))[:, None].tolist()
        )
        return _Window(number, places, [[documents[i] for i in line] for line in plan], cut, digest(records))


class _Records:
    """The records of several sources, endless, each source in its share."""

    def __init__(
        self,
        inputs: Sequence[Input],
        how: Tokenising,
        weights: Sequence[float],
        places: Places,
        noticed: Sequence[Noticed],
    ) -> None:
        self._weights = weights
        self._taken = list(places.taken)
        self._sources = [
            _Again(each, how, at, names) for each, at, names in zip(inputs, places.at, noticed, strict=True)
        ]

    @property
    def places(self) -> Places:
        """Where the next record is."""
        return Places(tuple(self._taken), tuple(source.at for source in self._sources))

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        source = next_source(self._taken, self._weights)
        record = next(self._sources[source])
        self._taken[source] += 1
        return record


class _Again:
    """The records of one source, from number `at` on, again and again."""

    def __init__(self, source: Input, how: Tokenising, at: int, noticed: Noticed) -> None:
        self._source, self._how, self._noticed = source, how, noticed
        self.at = at
        self._open = self._read()

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        record = next(self._open, None)
        if record is None:
            if not self.at:
                raise UserError(f"{self._source.name}: expected at least one record, found none")
            self.at, self._open = 0, self._read()
            return next(self)
        self.at += 1
        return record

    def _read(self) -> Iterator[Record]:
        for records, _ in tokenised(self._source, self._how, self._noticed, self.at):
            yield from records
