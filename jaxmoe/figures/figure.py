"""Figures as data: four kinds of picture, texts, and a table.

A figure holds its numbers. It writes them as the lines of a CSV file, draws them with matplotlib, and packs them for
the HTML page, whose script draws the same numbers in the browser. A figure with several pages shows one page at a time.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Num

_LAST = 65534  # the largest step; 65535 stands for NaN


@dataclass(frozen=True)
class Figure:
    """What all kinds share. `key` names the files; `caption` says in a sentence or two how to read the figure."""

    key: str
    title: str
    caption: str
    kind: ClassVar[str] = ""

    def csv_lines(self) -> Iterator[list[Any]]:
        """The lines of a CSV file, header first."""
        raise NotImplementedError

    def draw(self, axes: Any) -> None:
        """Draws the figure onto matplotlib's axes."""
        raise NotImplementedError

    def size(self) -> tuple[float, float]:
        """(width, height) in inches."""
        return 8, 4.5

    def page(self) -> dict[str, Any]:
        """The JSON values that the page's script reads."""
        head = {"kind": self.kind, "key": self.key, "title": self.title, "caption": self.caption}
        return head | {name: pack(value) for name, value in vars(self).items() if name not in head}


def pack(value: Any) -> Any:
    """A JSON value. Arrays become 16-bit steps between their smallest and largest value, in base64; integers of a range
    up to 65,534 are exact."""
    if not isinstance(value, np.ndarray):
        if isinstance(value, list | tuple):
            return [pack(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value
    finite = value[np.isfinite(value)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whole = np.issubdtype(value.dtype, np.integer) and high - low <= _LAST
    step = 1.0 if whole else (high - low) / _LAST or 1.0
    steps = np.where(np.isfinite(value), np.rint((np.where(np.isfinite(value), value, low) - low) / step), _LAST + 1)
    data = base64.b64encode(steps.astype("<u2").tobytes()).decode()
    return {"shape": list(value.shape), "low": low, "step": step, "data": data}


@dataclass(frozen=True)
class Heatmap(Figure):
    """One matrix per page; with `center` the colours diverge around that value. Columns without names are numbered."""

    row_label: str
    column_label: str
    unit: str
    values: Num[np.ndarray, "pages rows columns"]
    row_names: tuple[int, ...]
    page_names: tuple[str, ...] = ("",)
    center: float | None = None
    column_names: tuple[int, ...] | None = None
    kind: ClassVar[str] = "heatmap"

    def csv_lines(self) -> Iterator[list[Any]]:
        """One line per cell."""
        yield ["page", self.row_label, self.column_label, self.unit]
        for name, matrix in zip(self.page_names, self.values, strict=True):
            columns = range(matrix.shape[1]) if self.column_names is None else self.column_names
            for row, line in zip(self.row_names, matrix, strict=True):
                for column, value in zip(columns, line, strict=True):
                    yield [name, row, column, _short(value)]

    def size(self) -> tuple[float, float]:
        """Cells of about a tenth of an inch, at most 14 x 12 inches in all."""
        _, rows, columns = self.values.shape
        return min(14, 2.5 + 0.1 * max(columns, 40)), min(12, 1.6 + 0.12 * max(rows, 16))

    def draw(self, axes: Any) -> None:
        """Draws the middle page."""
        at = len(self.values) // 2
        matrix = self.values[at]
        low, high = _range(self.values)
        options: dict[str, Any] = {"cmap": "viridis", "vmin": low, "vmax": high}
        if self.center is not None:
            reach = max(abs(low - self.center), abs(high - self.center)) or 1.0
            options = {"cmap": "RdBu_r", "vmin": self.center - reach, "vmax": self.center + reach}
        image = axes.imshow(matrix, aspect="auto", interpolation="nearest", **options)
        axes.figure.colorbar(image, ax=axes, label=self.unit)
        step = max(1, len(self.row_names) // 12)
        axes.set_yticks(range(0, len(self.row_names), step), self.row_names[::step])
        if self.column_names is not None:
            step = max(1, len(self.column_names) // 8)
            axes.set_xticks(range(0, len(self.column_names), step), self.column_names[::step])
        axes.set_xlabel(self.column_label)
        axes.set_ylabel(self.row_label)
        if self.page_names[at]:
            axes.set_title(f"{self.title}: {self.page_names[at]}")


@dataclass(frozen=True)
class Series:
    """One line, with a band from `low` to `high` if given. A dashed line is a baseline, such as chance. A bridged line
    has no gaps where y is NaN, and a dot at each of few points."""

    name: str
    y: Num[np.ndarray, " x"]
    low: Num[np.ndarray, " x"] | None = None
    high: Num[np.ndarray, " x"] | None = None
    dashed: bool = False
    bridged: bool = False


@dataclass(frozen=True)
class Lines(Figure):
    """Series over common x values."""

    x_label: str
    y_label: str
    x: Num[np.ndarray, " x"]
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    ordered: bool = False  # the series have an order: shades of one colour, first to last
    from_zero: bool = True  # the page's y axis of numbers above zero begins at zero
    kind: ClassVar[str] = "lines"

    def csv_lines(self) -> Iterator[list[Any]]:
        """One line per point."""
        yield ["series", self.x_label, self.y_label, "low", "high"]
        for line in self.series:
            for i, x in enumerate(self.x):
                band = (
                    ("", "") if line.low is None or line.high is None else (_short(line.low[i]), _short(line.high[i]))
                )
                yield [line.name, _short(x), _short(line.y[i]), *band]

    def draw(self, axes: Any) -> None:
        """Draws the lines and their bands."""
        import matplotlib

        shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, max(len(self.series), 2)))
        for number, line in enumerate(self.series):
            color = shades[number] if self.ordered else "0.45" if line.dashed else f"C{number % 10}"
            style = "--" if line.dashed else "-"
            there = np.isfinite(line.y) if line.bridged else np.ones(len(self.x), bool)
            marker = "o" if there.sum() < 40 and not line.dashed else None
            axes.plot(self.x[there], line.y[there], style, color=color, marker=marker, ms=3, lw=1.2, label=line.name)
            if line.low is not None and line.high is not None:
                axes.fill_between(self.x, line.low, line.high, color=color, alpha=0.2, lw=0)
        axes.set_xscale("log" if self.log_x else "linear")
        axes.set_yscale("log" if self.log_y else "linear")
        axes.set_xlabel(self.x_label)
        axes.set_ylabel(self.y_label)
        if 1 < len(self.series) <= 12:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.25)

    def page(self) -> dict[str, Any]:
        """The JSON values, with each series packed by itself."""
        lines = [{name: pack(value) for name, value in vars(line).items()} for line in self.series]
        return Figure.page(replace(self, series=())) | {"series": lines}


@dataclass(frozen=True)
class Bars(Figure):
    """Bars per page: one for each category and group, and a line at `baseline`."""

    category_label: str
    y_label: str
    values: Num[np.ndarray, "pages groups categories"]
    groups: tuple[str, ...]
    page_names: tuple[str, ...]
    baseline: float
    baseline_name: str
    kind: ClassVar[str] = "bars"

    def csv_lines(self) -> Iterator[list[Any]]:
        """One line per bar."""
        yield ["page", "group", self.category_label, self.y_label, self.baseline_name]
        for page, groups in zip(self.page_names, self.values, strict=True):
            for group, values in zip(self.groups, groups, strict=True):
                for category, value in enumerate(values):
                    yield [page, group, category, _short(value), _short(self.baseline)]

    def size(self) -> tuple[float, float]:
        """Wide enough for all bars, at most 14 inches."""
        return min(14, 4 + 0.05 * self.values.shape[1] * self.values.shape[2]), 4

    def draw(self, axes: Any) -> None:
        """Draws the middle page."""
        at = len(self.values) // 2
        groups, categories = self.values.shape[1:]
        width = 0.8 / groups
        for number, (name, values) in enumerate(zip(self.groups, self.values[at], strict=True)):
            axes.bar(np.arange(categories) + (number - (groups - 1) / 2) * width, values, width, label=name)
        axes.axhline(self.baseline, color="0.3", ls="--", lw=1, label=self.baseline_name)
        axes.set_xlabel(self.category_label)
        axes.set_ylabel(self.y_label)
        axes.set_title(f"{self.title}: {self.page_names[at]}")
        axes.legend(fontsize=8)


@dataclass(frozen=True)
class Passage(Figure):
    """Text whose tokens are coloured by the first of their `experts`; one page per layer."""

    pieces: tuple[str, ...]
    domains: tuple[str, ...]
    experts: Num[np.ndarray, "pages n k"]
    weights: Num[np.ndarray, "pages n k"]
    margins: Num[np.ndarray, "pages n"]
    losses: Num[np.ndarray, " n"] | None
    num_experts: int
    page_names: tuple[str, ...]
    kind: ClassVar[str] = "passage"

    def csv_lines(self) -> Iterator[list[Any]]:
        """One line per token and page."""
        yield ["page", "place", "domain", "token", "experts", "weights", "margin", "loss"]
        for page, name in enumerate(self.page_names):
            for i, piece in enumerate(self.pieces):
                experts = " ".join(map(str, self.experts[page, i]))
                weights = " ".join(str(_short(weight)) for weight in self.weights[page, i])
                loss = "" if self.losses is None else _short(self.losses[i])
                yield [name, i, self.domains[i], piece, experts, weights, _short(self.margins[page, i]), loss]

    def size(self) -> tuple[float, float]:
        """Lines of about a hundred characters, at most 12 x 12 inches."""
        return 12, min(12, 1.5 + 0.2 * (sum(len(piece) for piece in self.pieces) / 100 + len(set(self.domains)) + 10))

    def draw(self, axes: Any) -> None:
        """Draws the middle page in a fixed-width font."""
        import matplotlib

        at = len(self.page_names) // 2
        x, y = 0, 0
        colors = matplotlib.colormaps["hsv"](np.arange(self.num_experts) * 0.618034 % 1)
        for i, piece in enumerate(self.pieces):
            shown = piece.replace("\t", "    ")
            for number, part in enumerate(shown.split("\n")):
                if number or x + len(part) > 110 or (i and number == 0 and self.domains[i] != self.domains[i - 1]):
                    x, y = 0, y + 1
                if part:
                    box = {"facecolor": (*colors[self.experts[at, i, 0]][:3], 0.35), "edgecolor": "none", "pad": 0.4}
                    # An unescaped dollar sign begins a formula.
                    axes.text(x, -y, part.replace("$", r"\$"), family="monospace", fontsize=7, va="top", bbox=box)
                    x += len(part)
        axes.set_xlim(0, 112)
        axes.set_ylim(-y - 1.5, 0.5)
        axes.axis("off")
        axes.set_title(f"{self.title}: {self.page_names[at]}")


@dataclass(frozen=True)
class Samples(Figure):
    """Texts after their prompts; the last page is shown first."""

    page_names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]  # of each page
    texts: tuple[tuple[str, ...], ...]
    kind: ClassVar[str] = "samples"

    def csv_lines(self) -> Iterator[list[Any]]:
        """One line per text."""
        yield ["page", "prompt", "text"]
        for name, prompts, texts in zip(self.page_names, self.prompts, self.texts, strict=True):
            for prompt, text in zip(prompts, texts, strict=True):
                yield [name, prompt, text]

    def draw(self, axes: Any) -> None:
        """Draws the beginnings of the last page's texts."""
        axes.axis("off")
        lines = [f"{prompt!r}: {text!r}"[:110] for prompt, text in zip(self.prompts[-1], self.texts[-1], strict=True)]
        shown = "\n".join(lines[:20]).replace("$", r"\$")  # an unescaped dollar sign begins a formula
        axes.text(0, 1, shown, family="monospace", fontsize=7, va="top", transform=axes.transAxes)


@dataclass(frozen=True)
class Highlighted(Figure):
    """Texts in pieces, each "plain", "trained" or "cut"; one page per text."""

    page_names: tuple[str, ...]
    pieces: tuple[tuple[str, ...], ...]  # of each page
    kinds: tuple[tuple[str, ...], ...]
    kind: ClassVar[str] = "highlighted"

    def csv_lines(self) -> Iterator[list[Any]]:
        """One line per piece."""
        yield ["page", "kind", "piece"]
        for name, pieces, kinds in zip(self.page_names, self.pieces, self.kinds, strict=True):
            for piece, kind in zip(pieces, kinds, strict=True):
                yield [name, kind, piece]

    def draw(self, axes: Any) -> None:
        """Draws the beginning of each text."""
        axes.axis("off")
        lines = [
            f"{name}: {''.join(pieces)!r}"[:110] for name, pieces in zip(self.page_names, self.pieces, strict=True)
        ]
        shown = "\n".join(lines[:20]).replace("$", r"\$")  # an unescaped dollar sign begins a formula
        axes.text(0, 1, shown, family="monospace", fontsize=7, va="top", transform=axes.transAxes)


@dataclass(frozen=True)
class Table(Figure):
    """Lines of cells under a header."""

    header: tuple[str, ...]
    body: tuple[tuple[Any, ...], ...] = field(repr=False)
    kind: ClassVar[str] = "table"

    def csv_lines(self) -> Iterator[list[Any]]:
        """The header and the body."""
        yield list(self.header)
        for row in self.body:
            yield [_short(cell) for cell in row]

    def size(self) -> tuple[float, float]:
        """In proportion to its columns and lines, at most 16 x 14 inches."""
        return min(16, 1.3 * len(self.header)), min(14, 1 + 0.22 * len(self.body))

    def draw(self, axes: Any) -> None:
        """Draws the first 40 lines."""
        axes.axis("off")
        cells = [[str(_short(cell)) for cell in row] for row in self.body[:40]] or [["" for _ in self.header]]
        table = axes.table(cells, colLabels=self.header, loc="center", cellLoc="right")
        table.auto_set_font_size(False)
        table.set_fontsize(7)


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _short(value: Any) -> Any:
    """Numbers with six digits, which is more than a figure shows."""
    return float(f"{float(value):.6g}") if isinstance(value, float | np.floating) else value
