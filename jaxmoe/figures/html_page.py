"""The HTML page that shows figures: one file, no network, light and dark."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

from jaxmoe.figures.figure import Figure

_WITHOUT_SCRIPT = "The page's script draws the figures; each is also in png/ and csv/."


def page(
    title: str,
    header: Sequence[str],
    body: Iterable[Sequence[Any]],
    figures: Iterable[Figure],
    *,
    without_script: str = _WITHOUT_SCRIPT,
) -> str:
    """The page's HTML: a title, a table (`header` over the lines of `body`), and the figures; `without_script` is shown
    where scripts do not run.

    Style, script and numbers are part of the file. All text is escaped.
    """
    asset = lambda name: files("jaxmoe.figures").joinpath("page", name).read_text(encoding="utf-8")
    numbers = json.dumps([figure.page() for figure in figures], allow_nan=False)  # all of it ASCII
    # "</script" ends a script element, and "<!--<script>" hides its end.
    numbers = numbers.replace("<", "\\u003c")
    title = html.escape(title)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    cells = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in line) for line in body)
    lines = "".join(f"<tr>{line}</tr>" for line in cells)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{asset("report.css")}</style>
</head>
<body>
<h1>{title}</h1>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>
<nav></nav>
<main><noscript>{html.escape(without_script, quote=False)}</noscript></main>
<div id="tip"></div>
<script type="application/json" id="figures">{numbers}</script>
<script>
{asset("report.js")}</script>
</body>
</html>
"""
