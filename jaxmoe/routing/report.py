"""A folder with one self-contained HTML page (no network, light and dark), and a PNG and a CSV file of each figure."""

from __future__ import annotations

import csv
import html
import json
import pathlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from captures import Capture, tokenizer_digest
from jaxmoe.errors import UserError
from jaxmoe.figures.figure import Figure, save_png
from jaxmoe.routing import plots
from jaxmoe.routing.compare import check_comparable, compare, compare_domains
from jaxmoe.routing.summary import summarise
from jaxmoe.store.files import output_folder


def write_report(
    captures: Sequence[Capture],
    folder: str | pathlib.Path,
    *,
    tokenizer: Any = None,
    effects: pathlib.Path | None = None,
) -> int:
    """Writes `index.html`, `png/` and `csv/`; returns the number of figures.

    Args:
        captures: the first is described; each of the others is compared with it, token by token.
        folder: new or empty; it appears whole or not at all.
        tokenizer: shows tokens as text; without one they are numbers.
        effects: a CSV file of `python -m jaxmoe.routing effects`.

    Raises:
        UserError: captures of different texts or tokenizers, a tokenizer that is not theirs, or a bad CSV file.
    """
    first, *others = captures
    for other in others:
        check_comparable(first, other)
    if len({capture.name for capture in captures}) < len(captures):
        raise UserError("report: expected captures in folders of different names, found two of one name")
    decode = decoder(first, tokenizer)
    domains = compare_domains(first) if len(first.text["domains"]) > 1 else []
    figures = plots.of_capture(summarise(first), decode, domains)
    for other in others:
        figures += plots.of_comparison(compare(first, other), decode)
    if effects is not None:
        figures.append(plots.effect_map(_read_effects(effects)))
    with output_folder(folder) as out:
        (out / "png").mkdir()
        (out / "csv").mkdir()
        for figure in figures:
            save_png(figure, out / "png" / f"{figure.key}.png")
            with (out / "csv" / f"{figure.key}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(figure.rows())
        (out / "index.html").write_text(page(captures, figures), encoding="utf-8")
    return len(figures)


def decoder(capture: Capture, tokenizer: Any) -> plots.Decode:
    """Token id -> text, as the tokenizer says; its number without one.

    Raises:
        UserError: the tokenizer is not the one that made the capture.
    """
    if tokenizer is None:
        return lambda token: f"[{token}]"
    if tokenizer_digest(tokenizer) != capture.text["tokenizer"]:
        raise UserError(f"tokenizer: expected the one that made {capture.folder}, found another")
    return lambda token: tokenizer.decode([token])


def page(captures: Sequence[Capture], figures: Sequence[Figure]) -> str:
    """The page: style, script and numbers in one file."""
    part = lambda name: files("jaxmoe.figures").joinpath("page", name).read_text(encoding="utf-8")
    # Inside a script element, only "</" could end it.
    numbers = json.dumps([figure.page() for figure in figures], allow_nan=False).replace("</", "<\\/")
    names = [capture.name for capture in captures]
    title = html.escape(f"Routing of {names[0]}" + (f", against {', '.join(names[1:])}" if names[1:] else ""))
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in _about(c))}</tr>" for c in captures)
    header = "".join(f"<th>{name}</th>" for name in _ABOUT)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{part("report.css")}</style>
</head>
<body>
<h1>{title}</h1>
<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>
<nav></nav>
<main><noscript>The figures are drawn by the page's own script; each is also in png/ and csv/.</noscript></main>
<div id="tip"></div>
<script type="application/json" id="figures">{numbers}</script>
<script>
{part("report.js")}</script>
</body>
</html>
"""


_ABOUT = (
    "capture",
    "tokens",
    "domains",
    "MoE layers",
    "experts",
    "framework",
    "model",
    "adapter",
    "numbers",
    "control",
)


def _about(capture: Capture) -> list[Any]:
    source, model = capture.source, capture.model
    kind = f"{source.get('dtype')}, {source['quantization']}" if source.get("quantization") else source.get("dtype")
    experts = f"{model.num_experts_per_tok} of {model.num_experts}"
    control = json.dumps(capture.control) if capture.control else ""
    return [
        *(capture.name, f"{capture.tokens:,}", ", ".join(capture.text["domains"]), len(model.layers), experts),
        *(source.get("framework"), source.get("model") or "", source.get("adapter") or "", kind, control),
    ]


def _read_effects(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: expected a CSV file of the effects command, found none")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"layer", "expert", "change"} <= set(rows[0]):
        raise UserError(f"{path}: expected the columns layer, expert and change, found another table")
    return rows
