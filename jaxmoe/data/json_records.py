"""Records in files of JSON, compressed or not: one a line (JSONL), or all in one array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import closing

from jaxmoe.data import forms
from jaxmoe.data.compressed import Stream
from jaxmoe.data.raw import File, Input, Raw
from jaxmoe.errors import UserError
from jaxmoe.json_text import parse_json

MAX_LINE = 16 * 2**20  # bytes; a record of this length has some four million tokens
_BLANK = b" \t\r\n"
_BLANKS = re.compile("[ \t\r\n]*")
_CHUNK = 2**18  # bytes of an array that are read at once


def json_input(file: File) -> Input:
    """The records of a file, whose first character tells whether it is an array.

    Raises:
        UserError: the file is of another form.
    """
    with closing(Stream(file)) as stream:
        start = stream.peek(forms.START)[: forms.START].removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
        if form := forms.unread_text(start, file.name):
            raise UserError(f"{file.name}: expected records in JSON (one a line, or an array), found {form}")
    read = _array if start.startswith(b"[") else _lines
    return Input(file.name, lambda first: read(file, first), file.size, content=str(file.size))


def _lines(file: File, first: int) -> Iterator[Raw]:
    """The records of a JSONL file from number `first` on; blank lines are none."""
    end = count = 0
    with closing(Stream(file)) as stream:
        # A line is read only up to the limit: a file without line ends must not fill the memory.
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
            where = f"{file.name}:{number}"
            if len(line) > MAX_LINE:
                raise UserError(f"{where}: expected a line of at most {MAX_LINE >> 20} MiB, found a longer one")
            end += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            count += 1
            if count <= first:
                continue
            done = stream.position if stream.is_compressed else end
            yield Raw(where, parse_json(_decoded(line, where), where), len(line), done)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        raise UserError(f"{where}: expected UTF-8, found {found}") from None


def _array(file: File, first: int) -> Iterator[Raw]:
    """The records of a JSON array from number `first` on."""
    with closing(Stream(file)) as stream:
        text = _ArrayText(stream, file.name)
        for number, (where, record) in enumerate(text.elements()):
            if number >= first:
                yield Raw(where, parse_json(record, where), len(record), stream.position)


class _ArrayText:
    """The elements of a JSON array as text, with no more of the file in memory than one of them and a chunk."""

    def __init__(self, stream: Stream, name: str) -> None:
        self._stream, self._name = stream, name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._find_end = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False

    def elements(self) -> Iterator[tuple[str, str]]:
        """(`FILE: record N`, JSON) of each element.

        Raises:
            UserError: no array, an element that is no JSON or too long, or something after the array.
        """
        where = f"{self._name}: the array"
        self._take("[", where, "its start")
        number = 0
        if self._next() == "]":
            self._at += 1
        else:
            mark = ","
            while mark == ",":
                number += 1
                where = f"{self._name}: record {number}"
                yield where, self._element(where)
                mark = self._take(",]", where, "a comma or the end of the array after it")
        if self._next():
            raise UserError(f"{self._name}: expected nothing after the array, found {self._found()}")

    def _take(self, marks: str, where: str, expected: str) -> str:
        mark = self._next()
        if not mark or mark not in marks:
            raise UserError(f"{where}: expected {expected}, found {self._found()}")
        self._at += 1
        return mark

    def _next(self) -> str:
        """The next character that is not blank; empty at the end of the file."""
        while True:
            self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def _found(self) -> str:
        return repr(self._text[self._at : self._at + 20]) if self._next() else "the end of the file"

    def _element(self, where: str) -> str:
        """The JSON of the element that begins here."""
        self._next()
        while True:
            try:
                end = self._find_end(self._text, self._at)[1]
            except (ValueError, RecursionError) as error:
                if not self._may_go_on(error) or not self._more():
                    parse_json(self._text[self._at :], where)  # fails with one line
                    raise AssertionError("both parse the same text") from error
            else:
                if end < len(self._text) or not self._more():
                    element, self._at = self._text[self._at : end], end
                    return element
            if len(self._text) - self._at > MAX_LINE + 2 * _CHUNK:
                raise UserError(f"{where}: expected at most {MAX_LINE >> 20} MiB, found more")

    def _may_go_on(self, error: Exception) -> bool:
        """Whether the text may be JSON that only lacks its end: the error is there, or about an open string."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16

    def _more(self) -> bool:
        """Reads on, twice as much in all, so that a long element is not parsed too often; False at the end."""
        if self._ended:
            return False
        chunk = self._stream.read(max(_CHUNK, min(len(self._text), MAX_LINE)))
        self._ended = not chunk
        try:
            self._text = self._text[self._at :] + self._decode(chunk, final=self._ended)
        except UnicodeDecodeError as error:
            raise UserError(f"{self._name}: expected UTF-8, found byte 0x{error.object[error.start]:02x}") from None
        self._at = 0
        return not self._ended
