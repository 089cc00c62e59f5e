"""Records before they are recognised, and the inputs that they are read from."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from jaxmoe.errors import UserError


class Raw(NamedTuple):
    """One record as it was read."""

    where: str  # FILE:LINE, or FILE: record N; what the error about a bad record starts with
    value: Any  # what JSON can hold
    size: int  # about how many bytes of text it has
    done: int  # how much of the input is read, in the unit of `Input.size`


@dataclass(frozen=True)
class File:
    """A file on disk or on the hub: its name for messages, its bytes, how many they are."""

    name: str
    open: Callable[[], BinaryIO]
    size: int

    @staticmethod
    def local(path: pathlib.Path) -> File:
        """The file `path`, which exists."""
        return File(str(path), partial(path.open, "rb"), path.stat().st_size)


@dataclass(frozen=True)
class Input:
    """A file, a folder or a data set of the hub, opened for reading its records.

    `read(first)` yields the records from number `first` (from 0) on, in the input's own order. It may be called as
    often as needed. It raises UserError for a record that cannot be read.
    """

    name: str
    read: Callable[[int], Iterator[Raw]]
    size: int | None = None  # the unit is the input's: bytes, records; None: unknown
    records: int | None = None  # how many there are; None: unknown until all are read
    content: str = ""  # tells two versions of the input apart without reading it, such as its size
    unread: tuple[str, ...] = ()  # columns that the reader leaves out


def joined(name: str, parts: Sequence[Input], content: str) -> Input:
    """Several inputs as one; each is read when those before it are."""

    def read(first: int) -> Iterator[Raw]:
        number = 0
        for part in parts:
            if part.records is not None and number + part.records <= first:
                number += part.records
                continue
            start = 0 if part.records is None else max(0, first - number)
            number += start
            for raw in part.read(start):
                number += 1
                if number > first:
                    yield raw._replace(done=number)

    counts = [part.records for part in parts]
    total = None if None in counts else sum(filter(None, counts))
    unread = dict.fromkeys(itertools.chain.from_iterable(part.unread for part in parts))
    return Input(name, read, total, total, content, tuple(unread))


class naming:
    """What a library raises about an input, as one line that starts with the input's name."""

    def __init__(self, name: object) -> None:
        self._name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # Which type it is depends on what is damaged, or on why the hub does not answer.
        if error is None or isinstance(error, UserError | MemoryError) or not isinstance(error, Exception):
            return
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{self._name}: expected records that can be read, found: {reason}") from None
