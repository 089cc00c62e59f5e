"""Tables on the terminal and in CSV files, and numbers in a flag."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxmoe.errors import UserError, printable
from jaxmoe.store.files import output_file


def numbers(name: str, text: str | None, known: Sequence[int]) -> list[int]:
    """The numbers in a flag, separated by commas; all `known` ones if it is not given.

    Raises:
        UserError: `text` is not such a list, or has a number that is not known.
    """
    if text is None:
        return list(known)
    try:
        found = [int(item) for item in text.split(",")]
    except ValueError:
        raise UserError(f"{name}: expected numbers separated by commas, found {text!r}") from None
    if wrong := [number for number in found if number not in known]:
        raise UserError(f"{name}: expected numbers among {_ranges(known)}, found {wrong[0]}")
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 0 to 3, 5, 7 to 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def print_table(header: Sequence[str], body: Sequence[Sequence[Any]]) -> None:
    """Prints a table, as wide as it needs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=box.SIMPLE_HEAD)
    for line in body:
        texts = (f"{value:.4g}" if isinstance(value, float) else printable(str(value)) for value in line)
        table.add_row(*map(Text, texts))  # a plain string would be read as rich's markup
    console = Console()
    # A wide table is not cut to the terminal's width, and a pipe has no width.
    Console(width=max(console.width, 20 * len(header))).print(table)


def write_csv(path: pathlib.Path, header: Sequence[str], body: Sequence[Sequence[Any]]) -> None:
    """Writes a table as CSV."""
    with output_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *body])
