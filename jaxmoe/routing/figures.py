"""The kinds of figures, and `show`, which draws one in a notebook."""

from __future__ import annotations

from jaxmoe.figures.figure import Bars, Figure, Heatmap, Lines, Passage, Series, Table
from jaxmoe.figures.output import show

__all__ = ["Bars", "Figure", "Heatmap", "Lines", "Passage", "Series", "Table", "show"]
