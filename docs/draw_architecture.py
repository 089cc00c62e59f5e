"""Draws docs/architecture.svg, the picture of the rooms: `python -m docs.draw_architecture`.

The rooms and the arrows are those of `tests/test_walls.py`, which checks them against every import. An arrow goes from
a room to a room that it uses; an arrow that others already imply is left out. Only the positions are set here.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from tests.test_walls import USES

PICTURE = pathlib.Path(__file__).with_name("architecture.svg")
WIDTH, ROW, BOX = 960, 74, (132, 36)
# room -> (column from 0 to 6, floor from the top)
PLACES = {
    "routing": (4.9, 0),
    "doctor": (0.3, 1),
    "evaluate": (1.3, 0),
    "generate": (2.2, 1),
    "train": (2.6, 0),
    "runs": (4.4, 2),
    "control": (3.0, 2),
    "metrics": (5.8, 2),
    "model": (2.2, 3),
    "figures": (5.8, 3),
    "convert": (0.3, 4),
    "ops": (2.2, 4),
    "data": (4.0, 4),
    "torch_ref": (5.8, 4),
    "captures": (4.9, 5),
    "peers": (4.9, 6),
    "recode": (0.3, 5),
    "memory": (3.3, 5),
    "store": (0.3, 6),
    "fp8": (1.4, 6),
    "nf4": (2.5, 6),
    "forms": (1.95, 7),
    "distributed": (3.7, 6),
    "parameters": (3.7, 7),
}
BARS = {"cli": "cli: flags, errors and progress of every command", "base": "config, lora, presets, errors"}
"""Rooms that nearly every other room uses: drawn as bars at the bottom, without arrows."""
LABELS = {
    "metrics": "routing/metrics",
    "nf4": "nf4 codec, stack",
    "fp8": "fp8 codec, stack",
    "forms": "quantized_stack",
    "recode": "recode: nf4, fp8",
}
"""A room's label in the picture, if it differs from its name."""


def arrows(uses: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs (room, room that it uses), without those that follow from others."""

    def below(room: str) -> set[str]:
        return set().union(*({used} | below(used) for used in uses[room] & set(PLACES)))

    found = []
    for room in PLACES:
        used = uses[room] & set(PLACES)
        found += [(room, other) for other in sorted(used) if not any(other in below(via) for via in used - {other})]
    return found


def centre(room: str) -> tuple[float, float]:
    """The middle of a room's box, in pixels."""
    column, floor = PLACES[room]
    return 84 + column * (WIDTH - 168) / 6, 40 + floor * ROW


def draw() -> str:
    """The picture as SVG text."""
    height = 40 + 8 * ROW + 70
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#5b6573"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for room, used in arrows(USES):
        (x, y), (to_x, to_y) = centre(room), centre(used)
        y, to_y = y + BOX[1] / 2, to_y - BOX[1] / 2
        bend = (to_y - y) / 2
        path = f"M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {to_x:.0f} {to_y - bend:.0f} {to_x:.0f} {to_y:.0f}"
        parts.append(f'<path d="{path}" fill="none" stroke="#5b6573" stroke-width="1.3" marker-end="url(#tip)"/>')
    for room in PLACES:
        x, y = centre(room)
        fill = {"torch_ref": "#fde8d3", "peers": "#fde8d3", "captures": "#e3f2e1", "convert": "#e3f2e1"}.get(
            room, "#dfe9fb"
        )
        parts.append(
            f'<rect x="{x - BOX[0] / 2:.0f}" y="{y - BOX[1] / 2:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="6" '
            f'fill="{fill}" stroke="#33415c"/>'
            f'<text x="{x:.0f}" y="{y + 5:.0f}" font-size="14" text-anchor="middle" fill="#111827">'
            f"{LABELS.get(room, room)}</text>"
        )
    for i, text in enumerate(BARS.values()):
        y = 8 * ROW + 10 + i * (BOX[1] + 10)
        parts.append(
            f'<rect x="18" y="{y}" width="{WIDTH - 36}" height="{BOX[1]}" rx="6" fill="#eef0f3" stroke="#33415c"/>'
            f'<text x="{WIDTH / 2:.0f}" y="{y + 23}" font-size="14" text-anchor="middle" fill="#111827">{text}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
