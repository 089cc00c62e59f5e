"""Orbax items and manifests: how arrays lie in the folders that this package writes.

An item is a folder with the arrays of a flat dictionary. Its manifest, a JSON file beside it, has shape, dtype and
SHA-256 of every array. Orbax copies the host arrays that it saves, so items are written one after the other and should
be small. Arrays are NumPy; no model and no device is needed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import pathlib
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16, so that np.dtype("bfloat16") works)
import numpy as np

from jaxmoe.config import DTYPES, read_json
from jaxmoe.errors import UserError

# Compression runs on all cores at once, each with a chunk and its compressed copy: small chunks keep the peak low.
_CHUNK_BYTES = 16 * 2**20


def write_manifest(path: pathlib.Path, kind: str, version: int, content: Mapping[str, Any]) -> None:
    """Writes the JSON file `path`, which says what `kind` of folder it lies in and in which version of its format."""
    head = {"format": kind, "version": version}
    path.write_text(json.dumps(head | dict(content), indent=1) + "\n", encoding="utf-8")


def read_manifest(path: pathlib.Path, kind: str, versions: tuple[int, ...]) -> dict[str, Any]:
    """The content of a manifest.

    Raises:
        UserError: the file is missing or no JSON object, or it is of another kind or version.
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
        raise UserError(f"{where}: expected {missing[0]}, found none ({len(missing)} missing)")
    if unexpected:
        raise UserError(f"{where}: unexpected {unexpected[0]} ({len(unexpected)} unexpected)")


def check_entries(
    where: str, entries: Any, shapes: Mapping[str, tuple[int, ...]], fixed: Mapping[str, str] = MappingProxyType({})
) -> dict[str, np.dtype]:
    """Checks the manifest's entries of one item against the expected shapes and returns the dtypes.

    `fixed` names the dtypes that are given; every other one has to be a float.
    """
    same_names(where, shapes, entries)
    dtypes = {}
    for name, shape in shapes.items():
        entry = entries[name]
        if not isinstance(entry, dict) or set(entry) != {"shape", "dtype", "sha256"}:
            raise UserError(f"{where}: {name}: expected shape, dtype and sha256, found {entry!r}")
        if entry["shape"] != list(shape):
            raise UserError(f"{where}: {name}: expected shape {list(shape)}, found {entry['shape']}")
        if entry["dtype"] not in ((fixed[name],) if name in fixed else DTYPES):
            expected = fixed.get(name, "a float dtype")
            raise UserError(f"{where}: {name}: expected {expected}, found {entry['dtype']!r}")
        dtypes[name] = np.dtype(entry["dtype"])
    return dtypes


def checksum(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def write_item(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes one Orbax item and returns its entries for the manifest."""
    # In a thread of its own, which is waited for: Ctrl-C and SIGTERM are raised in the main thread, and one that tore
    # Orbax out of a write would leave others running while the folder is being removed.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(_save, path.resolve(), arrays).result()
    return {
        name: {"shape": list(array.shape), "dtype": array.dtype.name, "sha256": checksum(array)}
        for name, array in arrays.items()
    }


def _save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    with quiet_orbax() as ocp:
        # one file per chunk: the single-file format (OCDBT) gathers the whole item in memory before it writes
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
        save_args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
        try:
            checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays), save_args=save_args))
        except ValueError as error:
            _wait_for_stragglers(path)
            # tensorstore reports a failing disk as ValueError, with the cause in the text
            raise OSError(f"{path.name}: cannot be written: {first_line(error)}") from error
        finally:
            checkpointer.close()


def _wait_for_stragglers(path: pathlib.Path) -> None:
    """Returns once the writes that were under way when one failed have ended: nothing new appears beside `path`."""
    before = None
    while (now := sorted(map(str, path.parent.glob(f"{path.name}*/**/*")))) != before:
        before = now
        time.sleep(0.2)


def read_item(
    path: pathlib.Path, entries: Mapping[str, Any], verify: bool, partial: bool = False
) -> dict[str, np.ndarray]:
    """Reads one Orbax item, or (`partial`) some of its arrays, and compares it with its entries in the manifest.

    Raises:
        UserError: a missing or unreadable item, or an array whose shape, dtype or checksum differs.
    """
    if not path.is_dir():
        raise UserError(f"folder not found: {path} (the arrays of one item)")
    with quiet_orbax() as ocp:
        checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
        restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in entries}
        chosen = {"item": dict.fromkeys(entries, 0), "partial_restore": True} if partial else {}
        options = ocp.args.PyTreeRestore(restore_args=restore_args, **chosen)
        try:
            arrays = checkpointer.restore(path.resolve(), args=options)
        except Exception as error:
            # damaged files surface as whatever the layer that failed raises: ValueError, KeyError, JSON and zstd errors
            raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
        finally:
            checkpointer.close()
    same_names(str(path), entries, arrays)
    for name, entry in entries.items():
        array = arrays[name]
        if list(array.shape) != entry["shape"] or array.dtype != np.dtype(entry["dtype"]):
            found = f"{array.dtype} {list(array.shape)}"
            raise UserError(f"{path}: {name}: expected {entry['dtype']} {entry['shape']}, found {found}")
        if verify and (found := checksum(array)) != entry["sha256"]:
            raise UserError(f"{path}: {name}: expected SHA-256 {entry['sha256'][:16]}..., found {found[:16]}...")
    return arrays


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line; its type where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class _Silence:
    """While a call of Orbax runs: its log lines are dropped, and so are stray tracebacks.

    Orbax raises what it logs. It logs through absl's logger, as other libraries do, so only lines from Orbax's own
    files are dropped. When one array fails, Orbax stops listening to the others, and tensorstore prints a traceback for
    each of them through `sys.unraisablehook`. Calls in several threads overlap: the last one to end restores both.
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        import absl.logging

        if kind is not None:
            time.sleep(0.2)  # for the tracebacks that are still to come
        with self._lock:
            self._calls -= 1
            if self._calls == 0:
                sys.unraisablehook = self._hook
                absl.logging.get_absl_logger().removeFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in pathlib.PurePath(record.pathname).parts


_SILENCE = _Silence()


@contextlib.contextmanager
def quiet_orbax() -> Iterator[Any]:
    """Yields the module `orbax.checkpoint`, which prints nothing of its own within the block.

    It is imported here because it loads JAX, which conversion and forecasts can do without.
    """
    with _SILENCE:
        import orbax.checkpoint

        yield orbax.checkpoint
