"""What a model's weights are, in one digest that several threads or processes can form together.

SHA-256 runs over a stream, so one array of a gigabyte would keep one thread busy for most of a second. The digest of an
array is therefore the SHA-256 over the SHA-256 of its pieces of 1 MiB in C order; threads form those, since hashing
releases Python's lock. A converted folder's manifest has the digests of its arrays. For any other source they are
formed from the bytes that are read. The digest of the model is the SHA-256 over the list of the digests of its arrays,
layer by layer, in a fixed order. So parts may be formed anywhere, and a checkpoint has the same digest in HF form and
converted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.errors import UserError
from jaxmoe.store.checkpoint import Block

PREFIX = "weights:"  # before a digest over all weights; that of earlier versions, over a few rows, has none
PIECE, _TASK = 2**20, 32 * 2**20  # bytes: what is hashed as one, and what a thread takes at a time
_THREADS = max(4, min(16, os.cpu_count() or 1))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="hash")


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order."""
    return hashlib.sha256(_bytes(array).data).hexdigest()


def checksums(arrays: Iterable[np.ndarray]) -> list[str]:
    """`checksum` of each array, in threads."""
    return list(_pool().map(checksum, arrays))


def digest(array: np.ndarray) -> str:
    """SHA-256 over the SHA-256 of each piece of 1 MiB of the array's bytes in C order, formed by several threads."""
    return Pending.of(array).result()


class Pending:
    """The `digest` of an array that threads are forming. Meanwhile the array must not change."""

    def __init__(self, tasks: list[Future[bytes]]) -> None:
        """`tasks` return the digests of consecutive pieces, one after the other."""
        self._tasks = tasks

    @classmethod
    def of(cls, array: np.ndarray) -> Pending:
        """The digest of an array in NumPy."""
        data = _bytes(array)
        tasks = [data[start : start + _TASK] for start in range(0, len(data), _TASK)]
        return cls([_pool().submit(_hash_pieces, task) for task in tasks])

    @classmethod
    def on_device(cls, arrays: Sequence[Any]) -> Pending:
        """The digest of an array that is on the device as several. One thread forms it unless they are whole pieces."""
        whole = all(array.nbytes % PIECE == 0 for array in arrays[:-1])
        return cls([_pool().submit(_hash_from_device, task) for task in (zip(arrays) if whole else [arrays])])

    def result(self) -> str:
        """Waits for the threads; do not call it in one of them."""
        return hashlib.sha256(b"".join(task.result() for task in self._tasks)).hexdigest()

    def cancel(self) -> None:
        """Gives up what has not begun."""
        for task in self._tasks:
            task.cancel()


def _hash_pieces(data: np.ndarray) -> bytes:
    starts = range(0, len(data), PIECE)
    return b"".join(hashlib.sha256(data[start : start + PIECE].data).digest() for start in starts)


def _hash_piece(arrays: Sequence[np.ndarray]) -> bytes:
    """SHA-256 of the arrays' bytes taken together."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(_bytes(array).data)
    return total.digest()


def _hash_from_device(arrays: Sequence[Any]) -> bytes:
    """`_hash_pieces` of the arrays' bytes taken together; the host holds one array at a time."""
    hashes, rest = [], np.empty(0, np.uint8)
    for array in arrays:
        # of a copy, because JAX keeps what it sends to the host as long as the array on the device
        data = _bytes(np.asarray(array.copy()))
        data = np.concatenate([rest, data]) if rest.size else data
        whole = data.size - data.size % PIECE
        hashes.append(_hash_pieces(data[:whole]))
        rest = data[whole:].copy()
    return b"".join([*hashes, _hash_pieces(rest)])


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class _Pieces(NamedTuple):
    """An array of which this process forms the digest of some pieces: number -> SHA-256."""

    name: str  # for messages
    expected: str | None  # the digest of the array
    formed: dict[int, Future[bytes]]


class WeightsDigest:
    """Collects the parts of a model; blocks may come in any order.

    Use it as a context manager; it ends what threads still have to do.
    """

    def __init__(self, exchange: Callable[[bytes], list[bytes]] = lambda mine: [mine]) -> None:
        """`exchange` gives what every process of the run has passed to it."""
        self._parts: dict[tuple[str, int], tuple[str, tuple[int, ...], str | Pending]] = {}
        self._pieces: dict[tuple[str, int], _Pieces] = {}
        self._exchange = exchange

    def __enter__(self) -> WeightsDigest:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for *_, found in self._parts.values():
            if isinstance(found, Pending):
                found.cancel()
        for pieces in self._pieces.values():
            for task in pieces.formed.values():
                task.cancel()

    def add(self, block: Block) -> None:
        """Takes the digests that the block brings and begins to form the others; returns at once."""
        layer = -1 if block.layer is None else block.layer
        for path, array in block.arrays.items():
            found = block.digests.get(path) or Pending.of(array)
            self._parts[path, layer] = array.dtype.name, array.shape, found
        for path, made in block.on_device.items():
            self._parts[path, layer] = made.dtype.name, made.shape, Pending.on_device(made.pieces)

    def add_pieces(
        self,
        place: tuple[str, int],
        array: Any,
        pieces: Mapping[int, Sequence[np.ndarray]],
        name: str,
        expected: str | None,
    ) -> None:
        """Begins to form the digests of those pieces of an array that this process forms; returns at once.

        `place` is a path and a layer, or -1 for the top level, `array` tells dtype and shape, and a piece is several
        arrays, one after the other. The digest must be the `expected` one, if there is one; `name` is for the error.
        """
        tasks = {number: _pool().submit(_hash_piece, parts) for number, parts in pieces.items()}
        self._parts[place] = np.dtype(array.dtype).name, tuple(array.shape), ""  # known when all processes are done
        self._pieces[place] = _Pieces(name, expected, tasks)

    def wait(self, block: Any) -> None:
        """Waits until the arrays of a block, or of portions of one, are read no more, so that its memory can be
        freed."""
        layer = -1 if block.layer is None else block.layer
        for path in (*block.arrays, *block.on_device):
            dtype, shape, found = self._parts[path, layer]
            self._parts[path, layer] = dtype, shape, _value(found)
            if (path, layer) in self._pieces:
                futures.wait(self._pieces[path, layer].formed.values())

    def parts(self) -> dict[tuple[str, int], str]:
        """(path, layer, or -1 for the top level) -> the digest of the array, its dtype and its shape.

        If several processes form the digest, all of them must call this, and each has the result.

        Raises:
            UserError: an array that several processes have read has another digest than it should have.
        """
        digests = {place: _value(found) for place, (_, _, found) in self._parts.items()} | self._joined()
        return {place: f"{dtype} {list(shape)} {digests[place]}" for place, (dtype, shape, _) in self._parts.items()}

    def _joined(self) -> dict[tuple[str, int], str]:
        """The digests of the arrays that several processes have read, from the pieces of all of them."""
        if not self._pieces:
            return {}
        mine = [
            (*place, number, task.result().hex())
            for place, pieces in self._pieces.items()
            for number, task in pieces.formed.items()
        ]
        hashes: dict[tuple[str, int], dict[int, bytes]] = {place: {} for place in self._pieces}
        for part in self._exchange(json.dumps(mine).encode()):
            for path, layer, number, text in json.loads(part):
                hashes[path, layer][number] = bytes.fromhex(text)
        found = {}
        for place, pieces in self._pieces.items():
            joined = b"".join(each for _, each in sorted(hashes[place].items()))
            found[place] = value = hashlib.sha256(joined).hexdigest()
            if pieces.expected not in (None, value):
                raise UserError(f"{pieces.name}: expected SHA-256 {pieces.expected[:16]}..., found {value[:16]}...")
        return found


def _value(found: str | Pending) -> str:
    return found if isinstance(found, str) else found.result()


def combined(parts: Mapping[tuple[str, int], str]) -> str:
    """The digest of a model from those of its parts, whoever formed them."""
    lines = (f"{path} {layer} {part}\n" for (path, layer), part in sorted(parts.items()))
    return PREFIX + hashlib.sha256("".join(lines).encode()).hexdigest()


def of_parameters(params: Mapping[str, Any]) -> str:
    """The digest of weights that were read from no folder, such as random ones: whole arrays are the parts."""
    with WeightsDigest() as whole:
        whole.add(Block(None, {path: np.asarray(array) for path, array in params.items()}))
        return combined(whole.parts())
