"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from jaxmoe.errors import UserError


@contextlib.contextmanager
def output_folder(dst: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `dst` and renames it to `dst` on success; on any failure nothing is left.

    Raises:
        UserError: `dst` exists and is not an empty folder.
    """
    final = pathlib.Path(dst).resolve()
    if final.exists() and not final.is_dir():
        raise UserError(f"{dst}: expected a folder that is new or empty, found a file")
    if final.is_dir() and any(final.iterdir()):
        raise UserError(f"{dst}: expected a folder that is new or empty, found one with files in it")
    new_parents = [parent for parent in final.parents if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        # a failure to clean up must not hide the failure that made it necessary
        temporary = tempfile.TemporaryDirectory(prefix=f".{final.name}-", dir=final.parent, ignore_cleanup_errors=True)
        with temporary as outer:
            # a folder inside the private one gets the permissions that the user's umask asks for
            inner = pathlib.Path(outer) / "content"
            inner.mkdir()
            yield inner
            inner.rename(final)
    except BaseException:
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def copy_file(src: pathlib.Path, dst: pathlib.Path) -> None:
    """Copies the content of a file, not its permissions: a read-only cache must not make a read-only output."""
    shutil.copyfile(src, dst)
