"""Files as streams of bytes, decompressed on the way: gzip and zstd.

What a compressed file asks for is bounded. It is decompressed in small pieces, and one that becomes hundreds of times
larger than it is on disk is refused.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from jaxmoe.data.extra import library
from jaxmoe.data.raw import File
from jaxmoe.errors import UserError

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
ENDINGS = (".gz", ".zst")
_FREE = 64 * 2**20  # bytes that any file may become
_MOST_TIMES = 200  # text becomes 3 to 20 times smaller, logs up to 100 times
# zstd writes up to 128 KiB for four bytes that it reads: a piece becomes 32 MiB at most.
_PIECE = 1024
_MAX_WINDOW = 128 * 2**20  # bytes; what the program zstd accepts, too


def check_growth(where: object, became: int, size: int) -> None:
    """Raises UserError if `size` bytes of a file became so many that it is no file of records."""
    if became > _FREE + _MOST_TIMES * size:
        raise UserError(
            f"{where}: expected records that are at most {_MOST_TIMES} times as large as the file, "
            f"found {became >> 20:,} MiB in {size:,} bytes; decompress it if that is right"
        )


class Stream(io.BufferedReader):
    """The decompressed content of a file; `position` is how much of the file itself is read."""

    def __init__(self, file: File) -> None:
        self._file = file.open()
        raw: Any = self._file
        try:
            start = self._file.read(4)
            self._file.seek(0)
            self.is_compressed = start.startswith((GZIP, ZSTD))
            if self.is_compressed:
                raw = _Decompressed(_reader(self._file, start, file.name), self._file, file.name)
            super().__init__(raw, 2**16)
        except BaseException:
            self._file.close()
            raise

    @property
    def position(self) -> int:
        """Bytes of the file that are read, buffers included."""
        return self._file.tell()

    def close(self) -> None:
        """Closes the file, too."""
        super().close()
        self._file.close()


def _reader(file: BinaryIO, start: bytes, name: str) -> Callable[[int], bytes]:
    if start.startswith(GZIP):
        return gzip.GzipFile(fileobj=file, mode="rb").read
    return _ZstdReader(file, library("zstandard", f"{name}: to read zstd-compressed data")).read


class _Decompressed(io.RawIOBase):
    """Bytes from `read`, with errors that name the file, and no more of them than a file of records has."""

    def __init__(self, read: Callable[[int], bytes], file: BinaryIO, name: str) -> None:
        self._read, self._file, self._name, self._became = read, file, name, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._read(len(buffer))
        except (OSError, EOFError, zlib.error, _ZstdFailure) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{self._name}: expected compressed data that is whole, found: {error}") from None
        self._became += len(found)
        check_growth(self._name, self._became, self._file.tell())
        buffer[: len(found)] = found
        return len(found)


class _ZstdFailure(Exception):
    """Damaged or truncated data."""


class _ZstdReader:
    """All frames of a zstd file, one after the other.

    The library's own stream reader takes a truncated file for a whole one.
    """

    def __init__(self, file: BinaryIO, zstandard: Any) -> None:
        self._file, self._error = file, zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj
        self._frame: Any = None
        self._rest = b""  # of the file, after the end of a frame
        self._ready = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end of the file."""
        while not self._ready:
            piece = self._rest or self._file.read(_PIECE)
            self._rest = b""
            if not piece:
                if self._frame is not None:
                    raise _ZstdFailure("the end of the file inside a frame")
                return b""
            self._frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(piece))
            except self._error as error:
                raise _ZstdFailure(str(error)) from None
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        found, self._ready = self._ready[:size], self._ready[size:]
        return bytes(found)
