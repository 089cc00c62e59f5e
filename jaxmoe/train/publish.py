"""What a run trained, with a model card beside it, and in a repository of the Hugging Face Hub."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Mapping

from jaxmoe.errors import UserError
from jaxmoe.runs.card import CARD_FILE, Kind, write_card
from jaxmoe.runs.record import read_run

_log = logging.getLogger("jaxmoe")

# An adapter lies beside the run's record and checkpoints, which are not published.
_ADAPTER_FILES = (CARD_FILE, "adapter_config.json", "adapter_model.safetensors")


def check_access(repository: str) -> None:
    """Raises UserError unless `repository` can be an id and the hub accepts the token: asked before a long run."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"push_to_hub: expected NAME or OWNER/NAME, found {repository!r} ({reason})") from None
    try:
        HfApi().whoami()
    except Exception as error:  # the library raises its own, and those of its HTTP library
        raise UserError(
            f"push_to_hub: the hub does not accept this machine: {_reason(error)}; run hf auth login"
        ) from None


def publish(run: pathlib.Path, folders: Mapping[Kind, pathlib.Path], repository: str | None) -> None:
    """Writes a card of the run in the folder `run` into each of the `folders`; uploads the first one if there is a
    repository for it.

    Raises:
        UserError: the hub cannot be reached or refuses; what was written here stays.
    """
    record = read_run(run)
    for kind, folder in folders.items():
        write_card(record, folder, kind)
    if repository is not None:
        kind, folder = next(iter(folders.items()))
        address = _push(folder, repository, _ADAPTER_FILES if kind == "adapter" else None)
        _log.info(f"uploaded to {address}")


def _push(folder: pathlib.Path, repository: str, files: tuple[str, ...] | None) -> str:
    """Uploads a folder, or only `files` of it, and returns the repository's address; a new repository is private.

    Raises:
        UserError: the hub cannot be reached or refuses; what was written here stays.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        made = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=None if files is None else list(files),
            commit_message="Upload from jaxmoe",
        )
    except Exception as error:
        again = f"{folder} is complete; upload it with: hf upload {repository} {folder}"
        raise UserError(f"push_to_hub: {repository}: {_reason(error)}; {again}") from None
    return str(made)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
