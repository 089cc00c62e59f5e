"""What `torch_ref`, which never imports jaxmoe, shares with jaxmoe's commands: how signals end a command, locks, output
folders that appear whole or not at all, one-line errors, bounded JSON.

Importing this module loads the standard library only.
"""

from __future__ import annotations

from jaxmoe.cli.arguments import ArgumentParser, path_name, run, whole_number
from jaxmoe.errors import UserError, check_integer, counted, shown
from jaxmoe.json_text import read_json
from jaxmoe.stopping import watch
from jaxmoe.store.files import claimed, os_error, output_folder
from jaxmoe.tokenizer_files import check_small_files

__all__ = [
    "ArgumentParser",
    "UserError",
    "check_integer",
    "check_small_files",
    "claimed",
    "counted",
    "os_error",
    "output_folder",
    "path_name",
    "read_json",
    "run",
    "shown",
    "watch",
    "whole_number",
]
