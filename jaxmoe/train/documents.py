"""The documents of a run: those to train on and those to evaluate on, read by one process or by several together."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoe.cli.progress import progress
from jaxmoe.data.inputs import opened
from jaxmoe.data.packing import Cut, Document, cut, total_of
from jaxmoe.data.raw import Input, joined
from jaxmoe.data.records import (
    OF_RECORDS,
    OnRead,
    Record,
    Tokenising,
    digest,
    hold_out,
    hold_out_of_parts,
    read_input,
)
from jaxmoe.data.shared import Share, SharedDocuments, shared_part
from jaxmoe.data.sources import Source, weights_of
from jaxmoe.distributed import launch
from jaxmoe.distributed.agreement import exchange
from jaxmoe.errors import UserError, counted
from jaxmoe.train.settings import TrainConfig


class Part(NamedTuple):
    """The documents of a part of the data, how many of its records were cut, and the identity's entry for it."""

    documents: Sequence[Document]
    lost: Cut
    digest: str
    sizes: tuple[int, ...] = ()  # documents of each source, where sources have weights

    def of_this_process(self) -> Iterable[Document]:
        """The documents that this process has tokenised."""
        return self.documents.own() if isinstance(self.documents, SharedDocuments) else self.documents


def read_parts(
    settings: TrainConfig, how: Tokenising, previous: Mapping[str, Any] | None, shared: pathlib.Path | None
) -> tuple[Part, Part | None]:
    """(the part to train on, the part to evaluate on, if there is one). `previous` is the identity of the run that is
    resumed; `shared` a folder that all of several processes can read and write.

    Raises:
        UserError: bad records, or none that can be learned.
    """
    if shared is None:
        return _read_alone(settings, how, previous or {})
    if weights_of(settings.sources) is not None:
        raise UserError("data: expected sources without weights, or streaming, since several processes read them")
    if not str((previous or {}).get("data", OF_RECORDS)).startswith(OF_RECORDS):
        raise UserError(
            f"{settings.output}: expected a run of this version, found one of an earlier version; resume it with one "
            "process"
        )
    return _read_together(settings, how, shared)


def _read_alone(settings: TrainConfig, how: Tokenising, previous: Mapping[str, Any]) -> tuple[Part, Part | None]:
    def read(sources: Sequence[Source], split: str | None) -> list[list[Record]]:
        return [_shown(source, split, lambda found, show: read_input(found, how, show)) for source in sources]

    def part(parts: Sequence[Sequence[Record]], entry: str, *, weighted: bool = False) -> Part:
        found = digest(itertools.chain(*parts), previous.get(entry))
        if not weighted:
            return Part(*cut(itertools.chain(*parts), settings.seq_length), found)
        each = [cut(one, settings.seq_length) for one in parts]
        documents = [document for documents, _ in each for document in documents]
        return Part(documents, total_of([lost for _, lost in each]), found, tuple(len(one) for one, _ in each))

    parts, held_out = read(settings.sources, settings.split), list[Record]()
    if settings.eval_data is not None:
        held_out = [*itertools.chain(*read(settings.eval_sources, settings.eval_split))]
    elif settings.eval_fraction is not None:
        parts, held_out = hold_out_of_parts(parts, settings.eval_fraction)
    weighted = weights_of(settings.sources) is not None
    return part(parts, "data", weighted=weighted), part([held_out], "eval_data") if held_out else None


def _read_together(settings: TrainConfig, how: Tokenising, shared: pathlib.Path) -> tuple[Part, Part | None]:
    this = launch.this()
    share = Share(this.index, this.count)

    def read(sources: Sequence[Source], split: str | None) -> tuple[dict[int, Record], int]:
        found = [opened(source.name, split) for source in sources]
        together = found[0] if len(found) == 1 else joined(", ".join(each.name for each in found), found, "")
        with progress(f"reading {together.name}") as show:
            return share.read(together, how, lambda *done: show(*_in_words(*done)))

    def part(own: dict[int, Record], numbers: Sequence[int], name: str) -> Part:
        found = shared_part(own, numbers, share, settings.seq_length, shared / name, exchange)
        return Part(found.documents, found.lost, found.digest)

    own, total = read(settings.sources, settings.split)
    numbers, held_out = list(range(total)), list[int]()
    of_held_out = own
    if settings.eval_data is not None:
        of_held_out, total = read(settings.eval_sources, settings.eval_split)
        held_out = list(range(total))
    elif settings.eval_fraction is not None:
        numbers, held_out = hold_out(numbers, settings.eval_fraction)
    return part(own, numbers, "data"), part(of_held_out, held_out, "eval_data") if held_out else None


def read_held_out(settings: TrainConfig, how: Tokenising, previous: Mapping[str, Any]) -> Part | None:
    """The part to evaluate on of a run whose training data is streamed; every process reads it."""
    if settings.eval_data is None:
        return None
    records = []
    for source in settings.eval_sources:
        records += _shown(source, settings.eval_split, lambda found, show: read_input(found, how, show))
    return Part(*cut(records, settings.seq_length), digest(records, previous.get("eval_data")))


def _shown(source: Source, split: str | None, read: Callable[[Input, OnRead], list[Record]]) -> list[Record]:
    with progress(f"reading {source.name}") as show:
        return read(opened(source.name, split), lambda *done: show(*_in_words(*done)))


def _in_words(done: int, total: int | None, records: int) -> tuple[int, int, str]:
    share = f", {done / total:.0%}" if total else ""
    return done, total or done, f"{counted(records, 'record')}{share}"
