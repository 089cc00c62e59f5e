"""The report of captures: a folder with one self-contained HTML page, and each figure as PNG and CSV."""

from __future__ import annotations

import csv
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from captures import Capture, tokenizer_digest
from jaxmoe.errors import UserError, shown
from jaxmoe.figures.html_page import page
from jaxmoe.figures.output import save_all
from jaxmoe.routing import plots
from jaxmoe.routing.compare import check_comparable, compare, compare_domains
from jaxmoe.routing.summary import summarise
from jaxmoe.store.files import output_folder

MAX_INDEX, MAX_CELLS = 65_536, 2**20  # of a table of effects: its figure has a cell for every layer and expert


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
        tokenizer: shows tokens as text; without one, tokens are shown as numbers.
        effects: a CSV file of `python -m jaxmoe.routing effects`, to show as well.

    Raises:
        UserError: captures of different texts or tokenizers, another tokenizer than theirs, or a bad CSV file.
    """
    first, *others = captures
    for other in others:
        check_comparable(first, other)
    if len({capture.name for capture in captures}) < len(captures):
        raise UserError("report: expected captures in folders of different names, found two with the same name")
    decode = decoder(first, tokenizer)
    domains = compare_domains(first) if len(first.text["domains"]) > 1 else []
    figures = plots.of_capture(summarise(first), decode, domains)
    for other in others:
        figures += plots.of_comparison(compare(first, other), decode)
    if effects is not None:
        figures.append(plots.effect_map(_read_effects(effects)))
    with output_folder(folder) as out:
        save_all(figures, out)
        content = page(title_of(captures), _ABOUT, map(_about, captures), figures)
        (out / "index.html").write_text(content, encoding="utf-8")
    return len(figures)


def decoder(capture: Capture, tokenizer: Any) -> plots.Decode:
    """A function from token id to text; without a tokenizer, to the id in brackets.

    Raises:
        UserError: another tokenizer than the capture's.
    """
    if tokenizer is None:
        return lambda token: f"[{token}]"
    if tokenizer_digest(tokenizer) != capture.text["tokenizer"]:
        raise UserError(f"tokenizer: expected the one that made {capture.folder}, found another")
    return lambda token: tokenizer.decode([token])


def title_of(captures: Sequence[Capture]) -> str:
    """The report's title: the first capture's name, and what it is compared with."""
    first, *others = (capture.name for capture in captures)
    return f"Routing of {first}" + (f", compared with {', '.join(others)}" if others else "")


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
    """The cells of one capture, in the order of `_ABOUT`."""
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
        raise UserError(f"file not found: {path}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a CSV file, found another ({error})") from None
    if not lines or not {"layer", "expert", "change"} <= set(lines[0]):
        raise UserError(f"{path}: expected the columns layer, expert and change, found another table")
    for number, line in enumerate(lines, start=2):
        for name, most in (("layer", MAX_INDEX), ("expert", MAX_INDEX), ("change", None)):
            text = line[name]
            if not isinstance(text, str) or not _is_number(text, most):
                kind = "a finite number" if most is None else f"a whole number below {most}"
                raise UserError(f"{path}:{number}: {name}: expected {kind}, found {shown(text)}")
    cells = len({line["layer"] for line in lines}) * (1 + max(int(line["expert"]) for line in lines))
    if cells > MAX_CELLS:
        raise UserError(f"{path}: expected a table of at most {MAX_CELLS:,} layers times experts, found {cells:,}")
    return lines


def _is_number(text: str, most: int | None) -> bool:
    """Whether the text is a finite number, or a whole one from 0 to below `most`."""
    try:
        return math.isfinite(float(text)) if most is None else 0 <= int(text) < most
    except ValueError:
        return False
