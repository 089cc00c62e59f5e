"""What a model's weights are, in one digest that several threads or processes can form together.

The part is one array of one layer: its SHA-256. A converted folder's manifest has it, so that nothing is computed for
such a folder. For any other source it is formed from the bytes that are read, in threads, since hashing releases
Python's lock. The digest of the model is the SHA-256 over the list of its parts in a fixed order, so parts may be
formed anywhere and in any order, and a checkpoint has the same digest in HF form and converted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmoe.store.checkpoint import Block

PREFIX = "weights:"  # before a digest over all weights; that of earlier versions, over a few rows, has none
_THREADS = max(4, min(16, os.cpu_count() or 1))


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def _checksum_of_pieces(pieces: Iterable[Any]) -> str:
    """`checksum` of an array that is on the device in pieces; the host holds one piece at a time."""
    total = hashlib.sha256()
    for piece in pieces:
        # of a copy, because JAX keeps what it sends to the host as long as the array on the device
        total.update(np.ascontiguousarray(piece.copy()).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def checksums(arrays: Iterable[np.ndarray]) -> list[str]:
    """`checksum` of each array, in threads."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="hash") as pool:
        return list(pool.map(checksum, arrays))


class WeightsDigest:
    """Collects the parts of a model; blocks may come in any order.

    Use it as a context manager; it ends the threads that form checksums.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="hash")
        self._parts: dict[tuple[str, int], tuple[str, tuple[int, ...], str | Future[str]]] = {}

    def __enter__(self) -> WeightsDigest:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, block: Block) -> None:
        """Takes the digests that the block brings and begins to form the others; returns at once."""
        layer = -1 if block.layer is None else block.layer
        for path, array in block.arrays.items():
            digest = block.digests.get(path) or self._pool.submit(checksum, array)
            self._parts[path, layer] = array.dtype.name, array.shape, digest
        for path, made in block.on_device.items():
            digest = self._pool.submit(_checksum_of_pieces, made.pieces)
            self._parts[path, layer] = made.dtype.name, made.shape, digest

    def wait(self, block: Block) -> None:
        """Waits until the arrays of the block are read no more, so that its memory can be freed."""
        layer = -1 if block.layer is None else block.layer
        for path in (*block.arrays, *block.on_device):
            dtype, shape, digest = self._parts[path, layer]
            self._parts[path, layer] = dtype, shape, digest if isinstance(digest, str) else digest.result()

    def parts(self) -> dict[tuple[str, int], str]:
        """(path, layer, or -1 for the top level) -> the digest of the array, its dtype and its shape."""
        return {
            place: f"{dtype} {list(shape)} {digest if isinstance(digest, str) else digest.result()}"
            for place, (dtype, shape, digest) in self._parts.items()
        }


def combined(parts: Mapping[tuple[str, int], str]) -> str:
    """The digest of a model from those of its parts, whoever formed them."""
    lines = (f"{path} {layer} {part}\n" for (path, layer), part in sorted(parts.items()))
    return PREFIX + hashlib.sha256("".join(lines).encode()).hexdigest()


def of_parameters(params: Mapping[str, Any]) -> str:
    """The digest of weights that were read from no folder, such as random ones: whole arrays are the parts."""
    with WeightsDigest() as digest:
        digest.add(Block(None, {path: np.asarray(array) for path, array in params.items()}))
        return combined(digest.parts())
