"""Which reader an input needs: told by what it is and how it begins, not by its name."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Sequence

from jaxmoe.data import forms
from jaxmoe.data.datasets_library import folder_input, hub_input, hub_name, is_saved, saved_input
from jaxmoe.data.json_records import json_input
from jaxmoe.data.raw import File, Input
from jaxmoe.data.tables import PARQUET, parquet_input
from jaxmoe.errors import UserError, printable

_log = logging.getLogger("jaxmoe")


def check_split(names: Sequence[str | pathlib.Path], split: str | None, flag: str) -> None:
    """Checks that `split`, which `flag` gives, chooses a part of at least one of the inputs. A file has no parts; a
    notice names files among other inputs.

    Raises:
        UserError: all inputs are files, or an empty name.
    """
    if split is None:
        return
    if not split:
        raise UserError(f"{flag}: expected the name of a part, found an empty text")
    files = [str(name) for name in names if pathlib.Path(name).is_file()]
    if files and len(files) == len(names):
        raise UserError(f"{flag}: expected none, since a file has no parts; found {split!r} for {files[0]}")
    if files:
        _log.warning(printable(f"{flag}: read as a whole, since files have no parts: {', '.join(files)}"))


def opened(name: str | pathlib.Path, split: str | None = None, streaming: bool = False) -> Input:
    """A file, a folder or a data set of the hub, ready to read.

    A file holds JSON (one record a line, or one array), also in gzip or zstd, or Parquet. A folder is one that
    `datasets` wrote, or one of such files. Anything else that has the form owner/name or owner/name/subset is a data
    set of the hub. `split` chooses one part of a folder or data set (files
    have none); `streaming` reads the hub over the network.

    Raises:
        UserError: nothing of these, or it is damaged.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        if is_saved(path):
            return saved_input(path, split)
        if forms.holds_data(path):
            return folder_input(path, split)
        raise UserError(f"{path}: expected records, found a folder without any")
    if path.is_file():
        file = File.local(path)
        return parquet_input(file) if forms.first_bytes(path).startswith(PARQUET) else json_input(file)
    if not path.exists() and (hub := hub_name(str(name))) is not None:
        return hub_input(hub, split, streaming)
    raise UserError(forms.missing_file(path))
