"""The kinds of figures, for a notebook: `show(figure)` draws one where it stands."""

from __future__ import annotations

from jaxmoe.figures.figure import Bars, Figure, Heatmap, Lines, Passage, Series, Table, show

__all__ = ["Bars", "Figure", "Heatmap", "Lines", "Passage", "Series", "Table", "show"]
