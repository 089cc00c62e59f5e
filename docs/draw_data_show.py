"""Draws `docs/data-show.svg`, what `python -m jaxmoe.data show` prints: `python -m docs.draw_data_show`."""

from __future__ import annotations

import io
import json
import pathlib
import re
import tempfile

from rich.console import Console

from jaxmoe.data.chat import load_tokenizer
from jaxmoe.data.inputs import opened
from jaxmoe.data.overview import examples, overview
from jaxmoe.data.records import Tokenising
from jaxmoe.data.show import print_overview

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "data-show.svg"
MODEL = ROOT / "tests" / "checkpoints" / "qwen3-moe-stdlib"
RECORDS = [
    {
        "conversations": [
            {"from": "human", "value": "What does a router route?"},
            {"from": "gpt", "value": "Tokens. Each one goes to a few experts."},
            {"from": "human", "value": "How many?"},
            {"from": "gpt", "value": "Eight of 128."},
        ],
        "source": "made up",
    },
    {"instruction": "Add two numbers.", "input": "", "output": "def add(a, b):\n    return a + b\n" * 4},
    *({"text": f"Text number {i}. " * (1 + i * i % 11)} for i in range(60)),
]


def draw() -> str:
    """The picture as SVG, without the web font that rich refers to."""
    console = Console(file=io.StringIO(), record=True, width=92)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "chats.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        source = opened(path)
        how = Tokenising(load_tokenizer(MODEL), 2048)
        shown = [
            example._replace(where=f"chats.jsonl:{n}") for n, example in enumerate(examples(source, how, 96, 2, 200), 1)
        ]
        print_overview(console, shown, overview([source], how, 96, None, lambda *_: None))
    svg = console.export_svg(title="python -m jaxmoe.data show --model DIR --data chats.jsonl --seq-length 96")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
