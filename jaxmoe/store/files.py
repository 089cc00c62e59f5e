"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping

from jaxmoe.errors import UserError


@contextlib.contextmanager
def output_folder(dst: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `dst` and renames it to `dst` on success; after a failure nothing is left.

    Raises:
        UserError: `dst` exists and is not an empty folder.
    """
    final = pathlib.Path(os.path.realpath(dst))  # unlike Path.resolve, it has no error for links in a circle
    if final.exists() and not final.is_dir():
        raise UserError(f"{dst}: expected a new or empty folder, found a file")
    if final.is_dir() and any(final.iterdir()):
        raise UserError(f"{dst}: expected a new or empty folder, found one with files in it")
    new_parents = [parent for parent in final.parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A failure to clean up must not hide the failure before it.
        temporary = tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent, ignore_cleanup_errors=True)
        with temporary as outer:
            # The temporary folder is private; a folder inside it gets the permissions of the user's umask.
            inner = pathlib.Path(outer) / "content"
            inner.mkdir()
            yield inner
            inner.rename(final)
    except BaseException:
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def write_files(folder: pathlib.Path, files: Mapping[str, pathlib.Path | bytes]) -> None:
    """Writes `files`, name -> content or the file to copy, into `folder`.

    The permissions of a file are not copied: files of a read-only cache become writable.
    """
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)


def refuse_links_out(folder: pathlib.Path) -> None:
    """Raises UserError if a link in `folder`, one of the folders that this package writes, leads out of it.

    The package writes no links, so such a link is somebody else's: it would make a command read any file of the user.
    """
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if os.path.islink(path) and not os.path.realpath(path).startswith(root + os.sep):
                raise UserError(f"{path}: expected a file of this folder, found a link that leads out of it")
