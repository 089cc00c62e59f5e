"""Where a checkpoint is: a local folder, or a model on the Hugging Face hub that is downloaded into the hub's cache."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable

from jaxmoe.errors import UserError

# weights as safetensors only; a repository may hold pickles of the same weights beside them
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "merges.txt",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(name: str, patterns: Iterable[str] = CHECKPOINT_FILES) -> pathlib.Path:
    """The folder `name`, or the snapshot of the hub's model `name` with the files that match `patterns`.

    Raises:
        UserError: neither a folder nor a model that the hub gives out (no such model, no access, no network).
    """
    path = pathlib.Path(name)
    if path.exists() or not _HUB_ID.fullmatch(name):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{name}: no such folder, and a hub id needs `pip install huggingface_hub`") from None
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        # the hub's client raises errors of several HTTP libraries, with no common class between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: no such folder, and not to be had from the hub: {reason}") from error
