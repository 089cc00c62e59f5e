"""Data that several processes tokenise together: here threads, which exchange messages over a barrier."""

from __future__ import annotations

import pathlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from jaxmoe.data.packing import Batch, Sequences, cut
from jaxmoe.data.records import Record, digest
from jaxmoe.data.shared import Share, SharedPart, shared_part
from jaxmoe.errors import UserError

LENGTH = 12


def record(number: int, length: int, rejected: Record | None = None) -> Record:
    """A record of distinct tokens, of which those after the first are learned; some are longer than a sequence."""
    tokens = np.arange(length, dtype=np.int32) + 100 * number
    return Record(tokens, (tokens > 100 * number).astype(np.float32), number % 3 == 0, rejected)


def records(pairs: bool) -> list[Record]:
    lengths = np.random.default_rng(3).integers(1, 30, 70).tolist()
    return [record(n, length, record(n, 31 - length) if pairs else None) for n, length in enumerate(lengths)]


def together(count: int, folder: pathlib.Path, every: list[Record], numbers: list[int]) -> list[SharedPart]:
    """What each of `count` processes makes of the records `numbers`."""
    barrier, said = threading.Barrier(count), [b""] * count

    def exchange(mine: bytes, index: int) -> list[bytes]:
        said[index] = mine
        barrier.wait()
        return list(said)

    def process(index: int) -> SharedPart:
        share = Share(index, count)
        own = {number: every[number] for number in range(len(every)) if share.owner(number) == index}
        return shared_part(own, numbers, share, LENGTH, folder / "data", partial(exchange, index=index))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(process, range(count)))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_processes_have_the_documents_of_one(tmp_path: pathlib.Path, count: int, pairs: bool) -> None:
    every = records(pairs)
    numbers = [number for number in range(len(every)) if number % 5]
    chosen = [every[number] for number in numbers]
    documents, lost = cut(chosen, LENGTH)
    found = together(count, tmp_path, every, numbers)
    assert sum(len(list(part.documents.own())) for part in found) == len(documents)
    for part in found:
        assert part.digest == digest(chosen)
        assert part.lost == lost
        assert part.documents.lengths == [document.length for document in documents]
        for ours, theirs in zip(part.documents, documents, strict=True):
            for side, expected in zip(ours.sides, theirs.sides, strict=True):
                np.testing.assert_array_equal(side[:3], expected[:3])


def test_a_process_reads_the_documents_of_its_own_sequences(tmp_path: pathlib.Path) -> None:
    every = records(pairs=False)
    [part] = together(1, tmp_path, every, list(range(len(every))))
    read: list[int] = []

    class Watched(type(part.documents)):
        def __getitem__(self, index: int):
            read.append(index)
            return super().__getitem__(index)

    part.documents.__class__ = Watched
    sequences = Sequences(part.documents, LENGTH)
    whole = sequences.batch(1, (2, 4))
    read.clear()
    wanted = {0, 1, 4, 5}
    half = sequences.batch(1, (2, 4), lambda shape: wanted)
    plan = list(sequences.plan(1, 8))
    assert set(read) - {0} <= {index for line in wanted for index in plan[line]}  # the first tells whether it is a pair
    for name in Batch._fields[:5]:
        ours, theirs = (getattr(each, name).reshape(8, LENGTH) for each in (half, whole))
        for line in range(8):
            np.testing.assert_array_equal(ours[line], theirs[line] if line in wanted else 0)


def test_data_without_anything_to_learn_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"data: expected at least one record with a token to learn.*in 2 records"):
        together(1, tmp_path, [record(0, 1), record(1, 1)], [0, 1])


@pytest.mark.parametrize(
    "change", [lambda each: each[::-1], lambda each: each[:-1], lambda each: [record(0, 5), *each[1:]]]
)
def test_the_digest_tells_records_apart(change: Callable[[list[Record]], list[Record]]) -> None:
    every = records(pairs=False)
    assert digest(change(every)) != digest(every)
    assert digest(every, like=digest(every)) == digest(every)
    old = digest(every, like="0" * 64)  # the form of earlier versions
    assert len(old) == 64 and old != digest(change(every), like=old)
