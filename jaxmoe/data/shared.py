"""Data that several processes tokenise together: each its share of the records, once.

A process writes its documents into a file that all can read. Then they tell each other how long the documents are and
what they hold, in one digest for each record. So every process knows the plan of all sequences, and reads the documents
of its own ones.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from jaxmoe.data.packing import Cut, Document, documents_of
from jaxmoe.data.raw import Input, Raw
from jaxmoe.data.records import Noticed, OnRead, Record, Tokenising, digest_of_records, record_digest, tokenised
from jaxmoe.errors import UserError, counted

_TOGETHER = 16  # consecutive records that one process tokenises


class Share:
    """Which records of an input this process tokenises: number `index` of `count` processes."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def owner(self, number: int) -> int:
        """The process that tokenises this record of an input."""
        return number // _TOGETHER % self.count

    def read(self, source: Input, how: Tokenising, on_read: OnRead) -> tuple[dict[int, Record], int]:
        """(number -> record of this process, how many records the input has).

        Raises:
            UserError: the input holds no record, or one of this process is bad.
        """
        total = 0

        def own(first: int) -> Iterator[Raw]:
            nonlocal total
            for number, raw in enumerate(source.read(first), start=first):
                total = number + 1
                if self.owner(number) == self.index:
                    yield raw

        records: list[Record] = []
        noticed = Noticed(source)
        for part, done in tokenised(replace(source, read=own), how, noticed):
            records += part
            on_read(done, source.size, len(records))
        if not total:
            raise UserError(f"{source.name}: expected at least one record, found none")
        noticed.tell()
        numbers = (number for number in range(total) if self.owner(number) == self.index)
        return dict(zip(numbers, records, strict=True)), total


class Told(NamedTuple):
    """What a process tells the others about its records of a part of the data, in their order."""

    documents: np.ndarray  # [records]: how many documents each record became
    lengths: np.ndarray  # [documents, sides]: tokens of each document; of a pair, of both sides
    digests: np.ndarray  # [records, 32]: SHA-256 of each record
    cut: np.ndarray  # [3]: the fields of `Cut`

    def packed(self) -> bytes:
        """The inverse of `unpacked`."""
        file = io.BytesIO()
        for array in self:
            np.save(file, array, allow_pickle=False)
        return file.getvalue()

    @classmethod
    def unpacked(cls, message: bytes) -> Told:
        """The inverse of `packed`."""
        file = io.BytesIO(message)
        return cls(*(np.load(file, allow_pickle=False) for _ in cls._fields))


@dataclass(frozen=True)
class SharedPart:
    """A part of the data: its documents, how many records were cut, the digest of its records."""

    documents: SharedDocuments
    lost: Cut
    digest: str


def shared_part(
    own: Mapping[int, Record],
    numbers: Sequence[int],
    share: Share,
    seq_length: int,
    file: pathlib.Path,
    exchange: Callable[[bytes], list[bytes]],
) -> SharedPart:
    """The part of the data that consists of the records `numbers`, of which this process has those in `own`.

    The documents go to files whose names begin with that of `file`, which all processes can read. `exchange` gives what
    every process passes to it.

    Raises:
        UserError: no record has a token to learn.
    """
    mine = [own[number] for number in numbers if number in own]
    cuts = [documents_of(record, seq_length) for record in mine]
    documents = [document for found, _ in cuts for document in found]
    _write(_file_of(file, share.index), documents)
    told = Told(
        np.asarray([len(found) for found, _ in cuts], np.int32),
        np.asarray([[len(side.inputs) for side in document.sides] for document in documents], np.int32),
        np.frombuffer(b"".join(map(record_digest, mine)), np.uint8).reshape(-1, 32),
        np.asarray([lost for _, lost in cuts], np.int32).reshape(-1, 3).sum(axis=0),
    )
    everyone = [Told.unpacked(message) for message in exchange(told.packed())]
    owners, places, digests = [], [], []
    record, document = [0] * share.count, [0] * share.count  # how many of each process are in the lists
    for number in numbers:
        owner = share.owner(number)
        digests.append(everyone[owner].digests[record[owner]].tobytes())
        for _ in range(everyone[owner].documents[record[owner]]):
            owners.append(owner)
            places.append(document[owner])
            document[owner] += 1
        record[owner] += 1
    if not owners:
        raise UserError(
            f"data: expected at least one record with a token to learn within seq_length {seq_length}, found none in "
            f"{counted(len(numbers), 'record')}"
        )
    files = [_file_of(file, index) for index in range(share.count)]
    shared = SharedDocuments(files, [each.lengths for each in everyone], owners, places, share.index)
    cut = Cut(*(int(count) for count in np.sum([each.cut for each in everyone], axis=0)))
    return SharedPart(shared, cut, digest_of_records(digests))


class SharedDocuments(Sequence[Document]):
    """The documents of all processes, read from their files when they are wanted."""

    def __init__(
        self,
        files: Sequence[pathlib.Path],
        lengths: Sequence[np.ndarray],
        owners: Sequence[int],
        places: Sequence[int],
        mine: int,
    ) -> None:
        """`lengths` are those of each process's documents [documents, sides]; document i is number `places[i]` of
        process `owners[i]`. `mine` is this process."""
        self._files, self._sides = files, lengths
        self._owners, self._places, self._mine = owners, places, mine
        self._ends = [np.cumsum(each.sum(axis=1, dtype=np.int64)) if each.size else each for each in lengths]
        self._open: dict[int, np.ndarray] = {}
        self.lengths = [int(lengths[owner][place].max()) for owner, place in zip(owners, places, strict=True)]

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: int) -> Document:  # pyright: ignore[reportIncompatibleMethodOverride]
        owner, place = self._owners[index], self._places[index]
        if owner not in self._open:
            self._open[owner] = np.memmap(self._files[owner], np.int32, "r").reshape(3, -1)
        sides, at = [], int(self._ends[owner][place] - self._sides[owner][place].sum())
        for length in self._sides[owner][place]:
            inputs, labels, weights = np.array(self._open[owner][:, at : at + length])
            sides.append(Document(inputs, labels, weights.view(np.float32)))
            at += int(length)
        return sides[0] if len(sides) == 1 else sides[0]._replace(rejected=sides[1])

    def own(self) -> Iterator[Document]:
        """The documents that this process has tokenised."""
        return (self[index] for index, owner in enumerate(self._owners) if owner == self._mine)


def _file_of(file: pathlib.Path, process: int) -> pathlib.Path:
    return file.with_name(f"{file.name}-{process}")


def _write(file: pathlib.Path, documents: Sequence[Document]) -> None:
    """Writes inputs, labels and weights, each of all documents one after the other."""
    sides = [side for document in documents for side in document.sides]
    with file.open("wb") as out:
        for name in ("inputs", "labels", "weights"):
            for side in sides:
                getattr(side, name).tofile(out)
