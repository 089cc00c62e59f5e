"""An overview of data on the terminal, and as figures for a page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxmoe.data.overview import CUT, PLAIN, TRAINED, Example, Overview
from jaxmoe.errors import counted, printable
from jaxmoe.figures.figure import Figure, Highlighted, Lines, Series

_STYLES = {PLAIN: "dim", TRAINED: "bold green", CUT: "strike red"}
_BARS = 12  # lines of the histogram of lengths
_WIDTH = 40  # of its longest bar
CAPTION = (
    "The records as the model sees them, with the chat template and special tokens. Trained tokens are coloured; those "
    "that are struck out do not fit into a sequence."
)


def print_overview(console: Console, shown: Sequence[Example], numbers: Overview) -> None:
    """Prints the records, the numbers and a histogram of the lengths."""
    for example in shown:
        head = f"{example.where}  {example.form}  {_sizes(example)}"
        console.rule()
        console.print(Text(printable(head), "bold"))
        text = Text()
        for piece in example.pieces:
            text.append(printable(piece.text), _STYLES[piece.kind])
        if example.more:
            text.append(f" ... {counted(example.more, 'more token')}", "italic")
        console.print(text)
    console.rule()
    legend = Text()
    if console.color_system is None:
        legend.append("a terminal with colors, or --html, shows which tokens are trained and which are cut off", "dim")
    else:
        for kind, words in ((TRAINED, "trained"), (PLAIN, "read only"), (CUT, "cut off")):
            legend.append(words, _STYLES[kind]).append("  ")
    console.print(legend)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in numbers.table():
        table.add_row(Text(name, "bold"), Text(printable(value)))
    counts, edges = _histogram(numbers)
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * round(_WIDTH * count / max(counts)) or ("▏" if count else "")
        table.add_row(Text(f"{low:,} to {high - 1:,} tokens", "dim"), Text.assemble((bar, "green"), f" {count:,}"))
    console.print(table)


def figures(shown: Sequence[Example], numbers: Overview) -> list[Figure]:
    """The same as figures."""
    counts, edges = _histogram(numbers, bars=40)
    records = Highlighted(
        "records",
        "First records",
        CAPTION,
        tuple(f"{example.where}: {example.form}, {_sizes(example)}" for example in shown),
        tuple(tuple(piece.text for piece in example.pieces) for example in shown),
        tuple(tuple(piece.kind for piece in example.pieces) for example in shown),
    )
    lengths = Lines(
        "lengths",
        "Lengths",
        f"How many records have so many tokens. A sequence has {numbers.seq_length:,}.",
        "tokens",
        "records",
        np.asarray(edges[1:], np.int64) - 1,
        (Series("records", np.asarray(counts, np.int64)),),
    )
    return [records, lengths]


def _sizes(example: Example) -> str:
    return f"{counted(example.tokens, 'token')}, {example.trained:,} trained"


def _histogram(numbers: Overview, bars: int = _BARS) -> tuple[list[int], list[int]]:
    """(records, first length) of equal ranges of lengths; one more length ends the last range."""
    longest = int(numbers.lengths.max()) + 1
    step = -(-longest // min(bars, longest))
    edges = list(range(0, longest + step, step))
    counts, _ = np.histogram(numbers.lengths, bins=edges)
    return counts.tolist(), edges
