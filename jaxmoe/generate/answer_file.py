"""A JSONL file of answers that grows batch by batch and is continued after an interruption.

Beside it lies FILE.settings.json, which says how the answers are made: a file is only continued with equal settings.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jaxmoe import stopping
from jaxmoe.errors import ConfigError, UserError, in_words, shown
from jaxmoe.json_text import parse_json, read_json
from jaxmoe.store.files import naming_files, output_file
from jaxmoe.store.lock import output_lock

INDEX = "index"
ADDED = (INDEX, "completion", "finish_reason", "new_tokens")  # the fields of an answer beside those of its prompt


class AnswerFile:
    """The answers to `total` prompts: a line each, an object with the `index` of its prompt."""

    def __init__(self, path: pathlib.Path, total: int) -> None:
        self.done: set[int] = set()  # indices of the prompts that are answered
        self._path, self._total = path, total
        self._ordered = True
        self._last = -1

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that have no answer yet."""
        return [index for index in indices if index not in self.done]

    def append(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Adds answers, all of them or none: a signal waits, and after an error the file is as it was.

        Raises:
            OSError: the disk is full, for example; it names the file.
        """
        lines = b"".join(_line(answer) for answer in answers)
        with naming_files({self._path: self._path}), stopping.uninterrupted(), self._path.open("ab", 0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                while lines:
                    lines = lines[file.write(lines) :]
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        for answer in answers:
            self._add(answer[INDEX])

    def sort(self) -> None:
        """Puts the answers into the order of the prompts."""
        if self._ordered:
            return
        lines = dict(self._lines())
        with output_file(self._path) as file:
            file.write_bytes(b"".join(lines[index] for index in sorted(lines)))

    def recover(self) -> None:
        """Reads which prompts are answered, and drops a last line that was not finished.

        Raises:
            UserError: a line that is no answer to one of the prompts.
        """
        content = self._path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(self._path, end)
        for index, _ in self._lines():
            self._add(index)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        seen: set[int] = set()
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                answer = parse_json(line, where := f"{self._path}:{number}")
                index = answer.get(INDEX) if isinstance(answer, dict) else None
                if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < self._total:
                    wanted = f"an answer with an index below {self._total}"
                    raise UserError(f"{where}: expected {wanted}, found {shown(index)}; write to another file")
                if lost := [name for name in ADDED if name not in answer]:
                    raise UserError(f"{where}: expected the field {lost[0]!r}, found none; write to another file")
                if index in seen:
                    raise UserError(f"{where}: expected one answer to prompt {index}, found two; write to another file")
                seen.add(index)
                yield index, line

    def _add(self, index: int) -> None:
        self._ordered &= index > self._last
        self._last = index
        self.done.add(index)


@contextmanager
def answer_file(path: pathlib.Path, total: int, settings: Mapping[str, Any]) -> Iterator[AnswerFile]:
    """The answers at `path`, a new file or one that was begun with the same `settings`, which are JSON values.

    Raises:
        UserError: a file that was not begun here, other settings, or another process that writes the file.
    """
    record = path.with_name(f"{path.name}.settings.json")
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file, found something else")
    with output_lock(path):
        answers = AnswerFile(path, total)
        if path.is_file() and path.stat().st_size:
            _check_settings(path, record, settings)
            answers.recover()
        else:
            with output_file(record) as file:
                file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            path.touch()
        yield answers


def _check_settings(path: pathlib.Path, record: pathlib.Path, settings: Mapping[str, Any]) -> None:
    begun_with = f"as when {path.name} was begun"
    way_out = "continue with the same settings, or write to another file"
    if not record.is_file():
        raise UserError(f"{path}: expected a new file, found one without its {record.name}; write to another file")
    found = read_json(record)
    for name in settings.keys() | found.keys():
        begun, given = found.get(name), json.loads(json.dumps(settings.get(name)))
        if begun != given:
            raise ConfigError(
                f"{record}: {name}: expected {in_words(begun)}, {begun_with}, found {in_words(given)}; {way_out}"
            )


def _line(answer: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # a field of the prompt holds half of a surrogate pair
        return json.dumps(answer).encode() + b"\n"
