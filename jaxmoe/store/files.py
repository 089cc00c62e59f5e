"""Folders on disk: outputs that appear whole or not at all, one process at a time; which links are followed; and errors
that name their file.

In a model folder or an adapter that someone else made, any file may be a link to anywhere: caches of the hub consist of
links. In a folder that this package wrote, a link that leads out of it is an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial

from jaxmoe import stopping
from jaxmoe.errors import UserError, shown
from jaxmoe.store.lock import SUFFIX, InUse, output_lock
from jaxmoe.tokenizer_files import check_small_file

_UNFINISHED = ".jaxmoe-unfinished-"
_LONGEST_NAME = 255  # bytes, on Linux, macOS and Windows
_LEFTOVER = re.compile(rf"\.(?P<output>.+)(?:{re.escape(_UNFINISHED)}\w{{8}}|{re.escape(SUFFIX)})", re.DOTALL)
_live: set[pathlib.Path] = set()  # temporary folders of this process
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_OS_ERROR = re.compile(r"\bos[ _]error(?:_code)?[ =:']*(\d+)", re.IGNORECASE)


def is_file(path: pathlib.Path) -> bool:
    """Whether `path` is a file, or a link to one.

    Raises:
        UserError: `path` is a link that leads to nothing, or in a circle; or a pipe, a socket or a device.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: expected a file, found a broken link (to {os.readlink(path)})")
    _check_kind(path)
    return path.is_file()


def _check_kind(path: pathlib.Path) -> None:
    """Raises UserError if `path` is something else than a file or a folder: its reading may never end."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: expected a file, found a pipe, a socket or a device")


def named_in(folder: pathlib.Path, name: str, by: str) -> pathlib.Path:
    """The path of the file in `folder` that the content of its file `by` names.

    Raises:
        UserError: `name` is not the plain name of a file.
    """
    if name in (".", "..") or pathlib.PurePath(name).name != name or not _may_be_name(name):
        raise UserError(f"{folder / by}: expected names of files in its folder, found {shown(name)}, which is none")
    return folder / name


def _may_be_name(name: str) -> bool:
    try:
        return 0 < len(os.fsencode(name)) <= _LONGEST_NAME and "\0" not in name
    except UnicodeEncodeError:
        return False


def check_links(folder: str | os.PathLike[str]) -> None:
    """Checks a folder that this package wrote. The folder itself may be a link.

    Raises:
        UserError: a link in it leads out of it, or it holds a pipe or a device, whose reading may never end.
    """
    root = pathlib.Path(os.path.realpath(folder))  # unlike Path.resolve, it has no error for links in a circle
    for parent, folders, files in os.walk(root):
        for path in (pathlib.Path(parent, name) for name in (*folders, *files)):
            target = os.path.realpath(path) if path.is_symlink() else path
            if not pathlib.Path(target).is_relative_to(root):
                raise UserError(
                    f"{path}: expected a file of this folder, found a link to {target}, which is outside it"
                )
            _check_kind(path)


@contextlib.contextmanager
def output_folder(dst: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `dst` and renames it to `dst` on success; after a failure nothing is left.

    Meanwhile this process holds the lock of `dst`. What killed processes left beside it is removed.

    Raises:
        UserError: `dst` exists and is not an empty folder, or another process writes it.
        OSError: the disk is full, for example; it names a file in `dst`.
    """
    final = pathlib.Path(os.path.realpath(dst))
    with claimed(dst), unfinished_folder(final) as folder, naming_files({folder: pathlib.Path(dst)}):
        yield folder
        with stopping.uninterrupted():
            folder.rename(final)


@contextlib.contextmanager
def claimed(dst: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of an output folder, which must be new or empty. A command that works for long before it writes
    the folder claims it first, so that it does not work in vain.

    Raises:
        UserError: `dst` exists and is not an empty folder, or another process writes it.
    """
    final = pathlib.Path(os.path.realpath(dst))
    with output_lock(dst):
        remove_leftovers(final.parent)
        if final.exists() and not final.is_dir():
            raise UserError(f"{dst}: expected a new or empty folder, found a file")
        if final.is_dir() and final.samefile(os.curdir):  # the folder is replaced: shells would stay in the old one
            raise UserError(
                f"{str(dst) or '.'}: expected a new or empty folder, found the current one; name a folder in it"
            )
        if final.is_dir() and any(file.name != SUFFIX for file in final.iterdir()):
            raise UserError(f"{dst}: expected a new or empty folder, found one with files in it")
        yield


def check_output_file(dst: str | os.PathLike[str]) -> None:
    """Checks that a file can be written, without writing it. A command that works for long before it writes the file
    checks it first.

    Raises:
        UserError: `dst` is a folder.
        OSError: it would lie in something that is no folder, or in a read-only one.
    """
    final = pathlib.Path(os.path.realpath(dst))
    if final.is_dir():
        raise UserError(f"{dst}: expected a file to write, found a folder")
    folder = next(parent for parent in final.parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(dst))


@contextlib.contextmanager
def output_file(dst: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields the path of a temporary file and puts it in the place of `dst` on success; a failure changes nothing.

    Where `dst` is no ordinary file (a pipe, /dev/stdout), it is yielded itself.

    Raises:
        UserError: `dst` is a folder, or another process writes it.
        OSError: the disk is full, for example; it names `dst`.
    """
    final = pathlib.Path(os.path.realpath(dst))
    check_output_file(dst)
    if final.exists() and not final.is_file():
        with naming_files({pathlib.Path(dst): pathlib.Path(dst)}):
            yield pathlib.Path(dst)
        return
    with output_lock(dst):
        remove_leftovers(final.parent)
        with unfinished_folder(final) as folder, naming_files({folder / final.name: pathlib.Path(dst)}):
            yield folder / final.name
            if final.exists():
                shutil.copymode(final, folder / final.name)
            with stopping.uninterrupted():
                (folder / final.name).replace(final)


@contextlib.contextmanager
def unfinished_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `target`, which is always removed: at the end, by a signal, or by the next command that
    writes beside it."""
    outer = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}{_UNFINISHED}", dir=target.parent))
    with stopping.undone_by(partial(_remove_while_written, outer)):
        _live.add(outer)
        try:
            # The temporary folder is private; a folder inside it gets the permissions of the user's umask.
            inner = outer / "content"
            inner.mkdir()
            yield inner
        finally:
            _remove_tree(outer)
            _live.discard(outer)


def remove_leftovers(folder: pathlib.Path) -> None:
    """Removes the temporary folders and lock files in `folder` whose processes are dead: their lock is free.

    An error is no reason to stop: what cannot be removed stays.
    """
    present = set(folder.iterdir()) - _live if folder.is_dir() else set()
    found = [path for path in present if _LEFTOVER.fullmatch(path.name) and not path.is_symlink()]
    for path in sorted(found, key=lambda path: path.name.endswith(SUFFIX)):
        match = _LEFTOVER.fullmatch(path.name)
        assert match is not None
        with contextlib.suppress(InUse, OSError), output_lock(folder / match["output"]):
            if not path.name.endswith(SUFFIX):
                _remove_tree(path)


def _remove_tree(folder: pathlib.Path) -> None:
    """Removes a folder into which other threads may still write; a failure must not hide the failure before it."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _remove_while_written(folder: pathlib.Path) -> None:
    """Removes a folder although the threads that write it have not ended: one of them may make it anew."""
    absent = 0
    for _ in range(30):
        _remove_tree(folder)
        absent = 0 if folder.exists() else absent + 1
        if absent == 3:
            return
        time.sleep(0.1)


@contextlib.contextmanager
def naming_files(places: Mapping[pathlib.Path, pathlib.Path]) -> Iterator[None]:
    """Errors of the operating system within the block name a file that the user knows.

    `places` maps a temporary path to the user's: a path below the first is shown below the second. An error of the disk
    that names no file gets the second path of the first entry.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror is None:
            raise
        if error.filename is None:
            if error.errno not in _OF_THE_DISK:
                raise
            raise OSError(error.errno, error.strerror, str(next(iter(places.values())))) from error
        for temporary, known in places.items():
            path = pathlib.Path(os.fsdecode(error.filename))
            if path.is_relative_to(temporary):
                raise OSError(error.errno, error.strerror, str(known / path.relative_to(temporary))) from error
        raise


def os_error(path: pathlib.Path, text: str) -> OSError:
    """The error of the operating system that a library describes in `text`, about the file or folder `path`."""
    found = _OS_ERROR.search(text)
    if found is None:
        return OSError(errno.EIO, f"cannot be written: {text}", str(path))
    number = int(found[1])
    return OSError(number, os.strerror(number), str(path))


def write_files(folder: pathlib.Path, files: Mapping[str, pathlib.Path | bytes]) -> None:
    """Writes `files`, name -> content or the file to copy, into `folder`.

    The permissions of a file are not copied: files of a read-only cache become writable.

    Raises:
        UserError: a file to copy is larger than those beside weights are, or something that never ends.
    """
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            check_small_file(content)
            shutil.copyfile(content, folder / name)
