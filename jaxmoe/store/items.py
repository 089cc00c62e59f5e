"""Orbax items and manifests: how this package stores arrays on disk.

An item is a folder with the arrays of a flat dictionary. A manifest, a JSON file beside it, has the shape, dtype and
digest of every array; earlier versions wrote the SHA-256 of its bytes instead. Orbax copies the host arrays that it
saves, so large data is divided into items that are written one after the other. Arrays are NumPy; neither a model nor a
device is needed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import math
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16, so that np.dtype("bfloat16") works)
import numpy as np

from jaxmoe.config import DTYPES, read_json
from jaxmoe.errors import UserError, shown
from jaxmoe.json_text import MAX_FILE
from jaxmoe.store.boxes import Box, slices
from jaxmoe.store.digest import checksum, digest
from jaxmoe.store.files import os_error

# Every core compresses a chunk at the same time and holds its compressed copy, so small chunks need less memory.
# Processes that share an array read the chunks that hold their parts, so an array has several where it is not small.
_LEAST_CHUNK, _MOST_CHUNK, _CHUNKS = 2**20, 2**24, 16
_FORMS: dict[str, Callable[[np.ndarray], str]] = {"digest": digest, "sha256": checksum}
_MOST_COMPRESSED = 40_000  # zstd writes at least four bytes for every 128 KiB


def write_manifest(path: pathlib.Path, kind: str, version: int, content: Mapping[str, Any]) -> None:
    """Writes `content` to the JSON file `path`, with the kind of the folder and the version of its format."""
    head = {"format": kind, "version": version}
    path.write_text(json.dumps(head | dict(content), indent=1) + "\n", encoding="utf-8")


def read_manifest(path: pathlib.Path, kind: str, versions: tuple[int, ...]) -> dict[str, Any]:
    """Reads a manifest.

    Raises:
        UserError: the file is missing or not a JSON object, or its kind or version differs.
    """
    raw = read_json(path)
    if raw.get("format") != kind:
        raise UserError(f"{path}: format: expected {kind!r}, found {raw.get('format')!r}")
    if raw.get("version") not in versions:
        expected = " or ".join(map(str, versions))
        raise UserError(f"{path}: version: expected {expected}, found {raw.get('version')!r}")
    return raw


def same_names(where: str, expected: Iterable[str], found: Any) -> None:
    """Raises UserError unless `found` is a mapping with exactly the `expected` names."""
    if not isinstance(found, Mapping):
        raise UserError(f"{where}: expected a JSON object, found {type(found).__name__}")
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise UserError(f"{where}: missing {missing[0]} ({len(missing)} missing in all)")
    if unexpected:
        raise UserError(f"{where}: unexpected {unexpected[0]} ({len(unexpected)} unexpected in all)")


def check_entries(
    where: str, entries: Any, shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, str] = MappingProxyType({})
) -> dict[str, np.dtype]:
    """Checks a manifest's entries for one item against the expected shapes and returns the dtypes by name.

    `fixed` names the dtypes of arrays that allow only one; every other dtype must be a float.

    Raises:
        UserError: a missing or unexpected entry, or one with another shape or dtype.
    """
    same_names(where, shapes, entries)
    dtypes = {}
    for name, shape in shapes.items():
        entry = entries[name]
        if not isinstance(entry, dict) or set(entry) not in [{"shape", "dtype", form} for form in _FORMS]:
            raise UserError(f"{where}: {name}: expected shape, dtype and digest, found {shown(entry)}")
        if entry["shape"] != list(shape) or not isinstance(entry.get("digest", entry.get("sha256")), str):
            raise UserError(f"{where}: {name}: expected shape {list(shape)} and its digest, found {shown(entry)}")
        if entry["dtype"] not in ((fixed[name],) if name in fixed else DTYPES):
            expected = fixed.get(name, "a float dtype")
            raise UserError(f"{where}: {name}: expected {expected}, found {entry['dtype']!r}")
        dtypes[name] = np.dtype(entry["dtype"])
    return dtypes


def write_item(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes one Orbax item and returns its entries for the manifest.

    Raises:
        OSError: the disk is full or fails.
    """
    # Ctrl-C and SIGTERM raise in the main thread. If they interrupted Orbax, its other writes would go on while the
    # folder is removed. So Orbax runs in a second thread, and this one waits for it.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(_save, path.resolve(), arrays).result()
    return {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "digest": digest(array)}
        for name, array in arrays.items()
    }


def _save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    with quiet_orbax() as ocp:
        # One file per chunk: the single-file format (OCDBT) collects the whole item in memory before it writes.
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
        save_args = {
            name: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(array), shard_axes=_divided_axes(array))
            for name, array in arrays.items()
        }
        try:
            checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays), save_args=save_args))
        except ValueError as error:
            wait_for_stragglers(path)
            # tensorstore reports a failing disk as a ValueError, with the cause in its text.
            raise os_error(path, first_line(error, 3000)) from error
        finally:
            checkpointer.close()


def _chunk_bytes(array: np.ndarray) -> int:
    return min(max(_LEAST_CHUNK, array.nbytes // _CHUNKS), _MOST_CHUNK)


def _divided_axes(array: np.ndarray) -> tuple[int, ...]:
    """The axes along which every chunk holds one index: experts have chunks of their own, so that a process that holds
    some of them reads no others."""
    return (0,) if array.ndim > 2 and array.nbytes > _LEAST_CHUNK else ()


def wait_for_stragglers(path: pathlib.Path) -> None:
    """After a failed write, waits for those that ran at the same time, until no new file appears beside `path`."""
    before = None
    while (now := sorted(map(str, path.parent.glob(f"{path.name}*/**/*")))) != before:
        before = now
        time.sleep(0.2)


def read_item(
    path: pathlib.Path, entries: Mapping[str, Any], verify: bool, partial: bool = False
) -> dict[str, np.ndarray]:
    """Reads one Orbax item, or with `partial` only the arrays in `entries`, and compares it with its manifest entries.

    Raises:
        UserError: a missing or unreadable item, or an array whose shape, dtype or checksum differs.
    """
    if not path.is_dir():
        raise UserError(f"folder not found: {path}")
    for name, entry in entries.items():
        check_stored_array(path / name, entry["shape"], entry["dtype"])
    with quiet_orbax() as ocp:
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
        restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in entries}
        chosen = {"item": dict.fromkeys(entries, 0), "partial_restore": True} if partial else {}
        options = ocp.args.PyTreeRestore(restore_args=restore_args, **chosen)
        try:
            arrays = checkpointer.restore(path.resolve(), args=options)
        except Exception as error:
            # The type depends on the layer that meets the damage: ValueError, KeyError, JSON errors, zstd errors.
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
        finally:
            checkpointer.close()
    same_names(str(path), entries, arrays)
    for name, entry in entries.items():
        array = arrays[name]
        if list(array.shape) != entry["shape"] or array.dtype != np.dtype(entry["dtype"]):
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{path}: {name}: expected {entry['dtype']} {entry['shape']}, found {found}")
        form = "digest" if "digest" in entry else "sha256"
        if verify and (found := _FORMS[form](array)) != entry[form]:
            raise UserError(f"{path}: {name}: expected SHA-256 {entry[form][:16]}..., found {found[:16]}...")
    return arrays


def read_parts(
    path: pathlib.Path, entries: Mapping[str, Any], wanted: Mapping[str, Collection[Box]]
) -> dict[str, dict[Box, np.ndarray]]:
    """Reads boxes of arrays of one Orbax item: name -> box -> the part. Of the files only those are read that hold
    elements of a box. Shapes and dtypes are compared with the manifest entries, digests are not.

    Raises:
        UserError: a missing or unreadable item, or an array whose shape or dtype differs.
    """
    if not path.is_dir():
        raise UserError(f"folder not found: {path}")
    for name, entry in entries.items():
        check_stored_array(path / name, entry["shape"], entry["dtype"])
    with quiet_orbax():
        import tensorstore

        try:
            arrays = {
                name: tensorstore.open(
                    {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{(path / name).resolve()}/"}}, read=True
                )
                for name in wanted
            }
            reading = {
                name: {box: arrays[name].result()[slices(box)].read() for box in boxes}
                for name, boxes in wanted.items()
            }
            found = {name: {box: part.result() for box, part in parts.items()} for name, parts in reading.items()}
        except Exception as error:  # the type depends on the damage
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
    for name, parts in found.items():
        for part in parts.values():
            if part.dtype != np.dtype(entries[name]["dtype"]):
                raise UserError(f"{path}: {name}: expected {entries[name]['dtype']}, found {part.dtype}")
    return found


def check_stored_array(path: pathlib.Path, shape: Sequence[int], dtype: str) -> None:
    """Compares an array in a folder of Orbax (a zarr array) with what is expected, before memory is taken for it.

    Raises:
        UserError: another shape or dtype, chunks that are missing, or files too small or too large to hold so many
            elements.
    """
    chunks = check_zarray(str(path / ".zarray"), read_json(path / ".zarray"), shape)
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    wanted = math.prod(-(-size // n) for size, n in zip(shape, chunks, strict=True))
    if len(files) < wanted:
        raise UserError(f"{path}: expected {wanted:,} files with chunks of the array, found {len(files):,}")
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    sizes = [file.stat().st_size for file in files]
    if (largest := max(sizes, default=0)) > nbytes + MAX_FILE:  # libraries may read a file as a whole
        raise UserError(f"{path}: expected files of at most {nbytes + MAX_FILE:,} bytes, found one of {largest:,}")
    stored = sum(sizes)
    if nbytes > stored * _MOST_COMPRESSED:
        raise UserError(f"{path}: expected chunks that can hold {nbytes:,} bytes, found files of {stored:,} bytes")


def check_zarray(where: str, raw: Mapping[str, Any], shape: Sequence[int]) -> list[int]:
    """The sizes of the chunks in the description `raw` of a zarr array, within `shape`; a chunk is read as a whole.

    Raises:
        UserError: another shape, or chunks that are larger.
    """
    if raw.get("shape") != list(shape):
        raise UserError(f"{where}: shape: expected {list(shape)}, found {shown(raw.get('shape'))}")
    chunks = raw.get("chunks")
    if (
        not isinstance(chunks, list)
        or len(chunks) != len(shape)
        or not all(type(n) is int and 1 <= n <= max(size, 1) for n, size in zip(chunks, shape, strict=True))
    ):
        raise UserError(f"{where}: chunks: expected sizes within {list(shape)}, found {shown(chunks)}")
    return chunks


def first_line(error: BaseException, length: int = 300) -> str:
    """The first line of an error's text, for a message of one line; its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:length]


class _Silence:
    """Drops Orbax's log lines and stray tracebacks while a call of Orbax runs.

    Orbax also raises the errors that it logs. It logs through absl's logger, as other libraries do, so only lines from
    Orbax's own files are dropped. When one array fails, Orbax stops listening to the others, and tensorstore prints a
    traceback for each of them through `sys.unraisablehook`, or asyncio logs it when the task is collected, which may be
    long after the call: the filter on asyncio's logger stays. Calls in several threads overlap: the last one to end
    restores the rest.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._hook = sys.unraisablehook

    def __enter__(self) -> None:
        import absl.logging

        with self._lock:
            if self._calls == 0:
                self._hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
                absl.logging.get_absl_logger().addFilter(_not_from_orbax)
            self._calls += 1
            logging.getLogger("asyncio").addFilter(_not_a_task_of_orbax)  # stays: tasks may be collected much later

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import absl.logging

        if kind is not None:
            time.sleep(0.2)  # for the tracebacks that are still to come
        with self._lock:
            self._calls -= 1
            if kind is not None and not isinstance(self._hook, _WithoutTensorstore):
                self._hook = _WithoutTensorstore(self._hook)  # a loaded machine may take longer
            if self._calls == 0:
                sys.unraisablehook = self._hook
                absl.logging.get_absl_logger().removeFilter(_not_from_orbax)


class _WithoutTensorstore:
    """A hook for errors that nobody can catch; it drops those of tensorstore and passes on all others."""

    def __init__(self, hook: Callable[[Any], object]) -> None:
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        if "tensorstore" not in str(unraisable.exc_value):
            self._hook(unraisable)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in pathlib.PurePath(record.pathname).parts


def _not_a_task_of_orbax(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    frames = traceback.walk_tb(error.__traceback__ if error else None)
    from_orbax = any("orbax" in pathlib.PurePath(frame.f_code.co_filename).parts for frame, _ in frames)
    return not from_orbax and "tensorstore" not in str(error)


_SILENCE = _Silence()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[Any]:
    """Yields the module `orbax.checkpoint`, which prints nothing within the block.

    It is imported here because it loads JAX, which conversion and forecasts can do without.
    """
    with _SILENCE:
        import orbax.checkpoint

        yield orbax.checkpoint
