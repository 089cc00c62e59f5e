"""Finds a checkpoint: a local folder, or a model on the Hugging Face hub, downloaded into the hub's cache."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable

from jaxmoe.errors import UserError

# Weights only as safetensors: a repository may also hold pickles of the same weights, which are not needed.
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "merges.txt",
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(name: str, patterns: Iterable[str] = CHECKPOINT_FILES) -> pathlib.Path:
    """The local folder `name`, or the cached snapshot of the hub's model `name` with the files that match `patterns`.

    Raises:
        UserError: no such folder, and no download from the hub (no such model, no access, no network).
    """
    path = pathlib.Path(name)
    if path.exists() or not _HUB_ID.fullmatch(name):
        return path
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"folder not found: {name} (to download it from the hub, run `pip install huggingface_hub`)"
        ) from None
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        # The errors of the hub's client come from several HTTP libraries and have no common class in all versions.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"folder not found: {name}, and the hub did not provide it: {reason}") from error
