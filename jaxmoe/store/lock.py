"""One process writes an output at a time: a lock file beside the output says which.

The file lies beside the output, since the output's folder itself is renamed into place; in a parent folder that cannot
be written, it lies inside. The system releases the lock (`flock`) when its process dies, however it dies. Where the
file system has no such locks, the file itself is the lock: it names host and process, its time is renewed every few
seconds, and a lock whose process is gone or whose time is old is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from jaxmoe import stopping
from jaxmoe.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SUFFIX = ".jaxmoe-lock"
HEARTBEAT, DEAD_AFTER = 10.0, 60.0  # seconds: how often a lock is renewed, and when one without renewal is stale
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}

_held: dict[pathlib.Path, tuple[int, int]] = {}  # output -> (thread that holds it, how often)
_guard = threading.Lock()


class InUse(UserError):
    """Another process, or another thread of this one, holds the lock."""


@contextlib.contextmanager
def output_lock(dst: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of the output `dst`, a folder or a file that need not exist; its parents are made.

    The thread that holds it may lock it again. Parents that are still empty at the end are removed.

    Raises:
        InUse: another process or thread writes `dst`; the message names it.
        OSError: the lock file cannot be written, or `..` follows a folder that does not exist.
    """
    parts = pathlib.Path(dst).parts
    for at in (at for at, part in enumerate(parts, 1) if part == ".."):
        os.stat(pathlib.Path(*parts[:at]))  # realpath would leave out what does not exist, the system does not
    output, me = pathlib.Path(os.path.realpath(dst)), threading.get_ident()
    with _guard:
        again = output in _held and _held[output][0] == me
        if again:
            _held[output] = me, _held[output][1] + 1
    if again:
        try:
            yield
        finally:
            with _guard:
                _held[output] = me, _held[output][1] - 1
        return
    with _parents(output), _lock_file(str(dst), output):
        with _guard:
            _held[output] = me, 1
        try:
            yield
        finally:
            with _guard:
                del _held[output]


@contextlib.contextmanager
def _parents(output: pathlib.Path) -> Iterator[None]:
    """Makes the folders above `output`; afterwards those that it made and that are empty are removed."""
    made = [parent for parent in output.parents if not parent.exists()]

    def remove() -> None:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()

    with stopping.undone_by(remove):
        try:
            _make(output.parent)
            yield
        finally:
            remove()


def _make(folder: pathlib.Path) -> None:
    """Makes a folder and those above it.

    Raises:
        NotADirectoryError: one of them is a file; it is named.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None


@contextlib.contextmanager
def _lock_file(shown: str, output: pathlib.Path) -> Iterator[None]:
    path = output.parent / f".{output.name}{SUFFIX}"
    try:
        lock = _acquire(shown, path)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE or not output.is_dir():
            if error.errno == errno.ELOOP:  # a link in place of the lock
                raise
            raise OSError(error.errno, error.strerror, shown) from None  # not the lock, which nobody asked for
        lock = _acquire(shown, output / SUFFIX)
    with stopping.undone_by(lock.release):
        try:
            yield
        finally:
            lock.release()


def _acquire(shown: str, path: pathlib.Path) -> _FlockLock | _OwnerLock:
    try:
        return _FlockLock(shown, path)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return _OwnerLock(shown, path)


class _FlockLock:
    """A lock of the system on an open file. The file is removed at the end, so whoever locked a removed file tries
    again."""

    def __init__(self, shown: str, path: pathlib.Path) -> None:
        self._path = path
        while True:
            created, self._file = _open(path)
            try:
                _flock(self._file)
                if os.path.samestat(os.fstat(self._file), os.stat(path)):
                    break
            except BlockingIOError:
                os.close(self._file)
                raise _in_use(shown, _read_owner(path)) from None
            except FileNotFoundError:
                pass
            except OSError:
                os.close(self._file)
                if created:  # where there are no locks, the file itself would be one
                    path.unlink(missing_ok=True)
                raise
            os.close(self._file)
        with contextlib.suppress(OSError):  # on a full disk the lock holds, and only the name of its owner is missing
            os.truncate(self._file, 0)
            os.write(self._file, _owner())

    def release(self) -> None:
        """Removes the file, then the lock."""
        with contextlib.suppress(OSError):
            self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._file)


def _open(path: pathlib.Path) -> tuple[bool, int]:
    """(whether the file was made, its descriptor)."""
    while True:
        with contextlib.suppress(FileExistsError):
            return True, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(FileNotFoundError):  # removed in between
            # A lock is written: a link with its name must not lead that to a file elsewhere.
            return False, os.open(path, os.O_RDWR | _NO_LINKS)


def _flock(file: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class _OwnerLock:
    """A file that names its owner and is renewed as long as the owner lives."""

    def __init__(self, shown: str, path: pathlib.Path) -> None:
        self._path, self._content = path, _owner()
        while not self._create():
            owner = _read_owner(path)
            if not _is_stale(path, owner):
                raise _in_use(shown, owner)
            _take_away(path, owner)
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="lock", daemon=True).start()

    def _create(self) -> bool:
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        os.write(file, self._content)
        os.close(file)
        return True

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def release(self) -> None:
        """Removes the file, unless somebody has taken the lock over."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._path.read_bytes() == self._content:
                self._path.unlink()


def _is_stale(path: pathlib.Path, owner: dict[str, Any]) -> bool:
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("process"), int):
        try:
            os.kill(owner["process"], 0)
        except ProcessLookupError:
            return True
        except OSError:  # it runs, under another user
            pass
    try:
        # The file system's clock, not this machine's: they may differ.
        with tempfile.TemporaryFile(dir=path.parent) as file:
            now = os.fstat(file.fileno()).st_mtime
        # A time in the future is none that a living process has renewed: the clock was set back since.
        return abs(now - path.stat().st_mtime) > DEAD_AFTER
    except FileNotFoundError:
        return False


def _take_away(path: pathlib.Path, owner: dict[str, Any]) -> None:
    """Removes a stale lock file. Of several processes that try, one moves it; a newer lock is put back."""
    aside = path.with_name(f"{path.name}-{os.getpid()}-{threading.get_ident()}")
    with contextlib.suppress(OSError):
        path.rename(aside)
        if _read_owner(aside) != owner:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _owner() -> bytes:
    command = " ".join([pathlib.Path(sys.argv[0]).name if sys.argv else "python", *sys.argv[1:2]])[:100]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        command = f"python -m {spec.name.removesuffix('.__main__')}"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    owner = {"process": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
    return (json.dumps(owner) + "\n").encode()


def _read_owner(path: pathlib.Path) -> dict[str, Any]:
    """What the lock file says; an empty dictionary while it is being written."""
    try:
        file = os.open(path, os.O_RDONLY | _NO_LINKS)
        try:
            owner = json.loads(os.read(file, 4096))
        finally:
            os.close(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _in_use(shown: str, owner: dict[str, Any]) -> InUse:
    who = "another process"
    if owner:
        known = {name: str(owner.get(name))[:200] for name in ("process", "host", "command", "since")}
        who = "process {process} on {host} ({command}), since {since}".format(**known)
    return InUse(f"{shown}: in use by {who}; wait until it ends, or write to another place")
