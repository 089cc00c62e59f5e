"""Which files make a tokenizer; standard library only."""

from __future__ import annotations

import os
import pathlib

# Either set of files is a tokenizer of the Qwen family.
FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
NEEDED = "tokenizer.json, or vocab.json and merges.txt"


def has_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether a model folder holds a tokenizer.

    Without its files transformers 5 makes an empty tokenizer from config.json, so a caller must ask first.
    """
    return any(all(pathlib.Path(folder, name).is_file() for name in form) for form in FORMS)
