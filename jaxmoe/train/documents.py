"""The documents of a run: those to train on and those to evaluate on, read by one process or by several together."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoe.cli.progress import progress
from jaxmoe.data.inputs import opened
from jaxmoe.data.packing import Cut, Document, cut
from jaxmoe.data.records import OF_RECORDS, Record, Tokenising, digest, hold_out, read_input
from jaxmoe.data.shared import Share, SharedDocuments, shared_part
from jaxmoe.distributed import launch
from jaxmoe.distributed.agreement import exchange
from jaxmoe.errors import UserError
from jaxmoe.train.settings import TrainConfig


class Part(NamedTuple):
    """The documents of a part of the data, how many of its records were cut, and the identity's entry for it."""

    documents: Sequence[Document]
    lost: Cut
    digest: str

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
    if not str((previous or {}).get("data", OF_RECORDS)).startswith(OF_RECORDS):
        raise UserError(
            f"{settings.output}: expected a run of this version, found one of an earlier version; resume it with one "
            "process"
        )
    return _read_together(settings, how, shared)


def _read_alone(settings: TrainConfig, how: Tokenising, previous: Mapping[str, Any]) -> tuple[Part, Part | None]:
    def read(path: pathlib.Path) -> list[Record]:
        with progress(f"reading {path}") as show:
            return read_input(opened(path), how, lambda *done: show(*_in_words(*done)))

    def part(records: list[Record], entry: str) -> Part:
        return Part(*cut(records, settings.seq_length), digest(records, previous.get(entry)))

    records, held_out = read(settings.data), []
    if settings.eval_data is not None:
        held_out = read(settings.eval_data)
    elif settings.eval_fraction is not None:
        records, held_out = hold_out(records, settings.eval_fraction)
    return part(records, "data"), part(held_out, "eval_data") if held_out else None


def _read_together(settings: TrainConfig, how: Tokenising, shared: pathlib.Path) -> tuple[Part, Part | None]:
    this = launch.this()
    share = Share(this.index, this.count)

    def read(path: pathlib.Path) -> tuple[dict[int, Record], int]:
        with progress(f"reading {path}") as show:
            return share.read(opened(path), how, lambda *done: show(*_in_words(*done)))

    def part(own: dict[int, Record], numbers: Sequence[int], name: str) -> Part:
        found = shared_part(own, numbers, share, settings.seq_length, shared / name, exchange)
        return Part(found.documents, found.lost, found.digest)

    own, total = read(settings.data)
    numbers, held_out = list(range(total)), list[int]()
    of_held_out = own
    if settings.eval_data is not None:
        of_held_out, total = read(settings.eval_data)
        held_out = list(range(total))
    elif settings.eval_fraction is not None:
        numbers, held_out = hold_out(numbers, settings.eval_fraction)
    return part(own, numbers, "data"), part(of_held_out, held_out, "eval_data") if held_out else None


def _in_words(done: int, total: int | None, records: int) -> tuple[int, int, str]:
    share = f", {done / total:.0%}" if total else ""
    return done, total or done, f"{records:,} records{share}"
