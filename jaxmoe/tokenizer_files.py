"""Which files make a tokenizer, and whether libraries may read them as a whole; standard library only."""

from __future__ import annotations

import os
import pathlib

from jaxmoe.errors import UserError

# Either set of files is a tokenizer of the Qwen family.
FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
MAX_FILE = 100 * 2**20  # bytes; the largest published tokenizer.json has a third of this
_READ_WHOLE = {".json", ".txt", ".jinja", ".model"}  # suffixes of what libraries read beside the weights
NEEDED = "tokenizer.json, or vocab.json and merges.txt"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # where transformers keeps those with names, such as tool_use


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a model folder holds a tokenizer.

    Without its files transformers 5 makes an empty tokenizer from config.json, so a caller must ask first.
    """
    return any(all(pathlib.Path(folder, name).is_file() for name in form) for form in FORMS)


def check_small_files(folder: str | os.PathLike[str]) -> None:
    """Checks the files of a model folder that libraries read as a whole, whatever their size.

    Raises:
        UserError: one is larger than any published one, or is a pipe or a device, whose reading may never end.
    """
    inside = (path for pattern in ("*", MORE_TEMPLATES) for path in pathlib.Path(folder).glob(pattern))
    for path in sorted(path for path in inside if path.suffix in _READ_WHOLE):
        check_small_file(path)


def check_small_file(path: pathlib.Path) -> None:
    """Checks a file that is read or copied as a whole; a folder, and nothing at all, are no business of this check.

    Raises:
        UserError: as `check_small_files`.
    """
    if path.is_file():
        if (size := path.stat().st_size) > MAX_FILE:
            raise UserError(f"{path}: expected at most {MAX_FILE >> 20} MiB, found {size >> 20:,} MiB")
    elif path.exists() and not path.is_dir():
        raise UserError(f"{path}: expected a file, found a pipe, a socket or a device")
