"""Which reader an input needs: told by what it is and how it begins, not by its name."""

from __future__ import annotations

import pathlib

from jaxmoe.data import forms
from jaxmoe.data.datasets_library import folder_input, hub_input, hub_name, is_saved, saved_input
from jaxmoe.data.json_records import json_input
from jaxmoe.data.raw import File, Input
from jaxmoe.data.tables import PARQUET, parquet_input
from jaxmoe.errors import UserError


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
