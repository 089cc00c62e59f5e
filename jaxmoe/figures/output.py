"""Figures as pictures and files: in a notebook, as PNG, as CSV."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxmoe.figures.figure import Figure


def show(figure: Figure) -> Any:
    """The figure as a matplotlib figure, for a notebook."""
    import matplotlib.pyplot as plt

    canvas, axes = plt.subplots(figsize=figure.size(), layout="constrained")
    axes.set_title(figure.title)
    figure.draw(axes)
    return canvas


def save_png(figure: Figure, path: pathlib.Path) -> None:
    """Draws the figure into a PNG file; needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas = show(figure)
    canvas.savefig(path, dpi=130)
    plt.close(canvas)


def save_csv(figure: Figure, path: pathlib.Path) -> None:
    """Writes the figure's numbers as CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(figure.csv_lines())


def save_all(figures: Iterable[Figure], folder: pathlib.Path) -> None:
    """Writes each figure into the new folders `png/` and `csv/` of `folder`, under its key."""
    for name in ("png", "csv"):
        (folder / name).mkdir()
    for figure in figures:
        save_png(figure, folder / "png" / f"{figure.key}.png")
        save_csv(figure, folder / "csv" / f"{figure.key}.csv")
